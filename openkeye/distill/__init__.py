"""Multi-teacher on-policy distillation: several teachers, one student that answers for itself."""
