"""How weights change: the optimizer's parameter groups and the schedules that follow the token clock."""
