"""Before you spend a day: measure this machine for two minutes and predict a run."""
