"""Floor 7: what a person starts. Nobody imports apps."""
