"""The optimizer's parameter groups, and schedules over the token clock."""
