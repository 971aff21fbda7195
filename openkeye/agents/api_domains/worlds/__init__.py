"""The worlds, by theme. Every world has tables, rules and actions of its own."""
