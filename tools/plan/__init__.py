"""Before you spend a day: measure this machine for two minutes and report what a run will take.

    python -m tools.plan --config rn50_88_epochs.yaml

__main__.py     the command: settings, order of events
measure.py      the trainer's own functions under a clock
storage.py      the data file: disk, page cache, memory
forecast.py     from measured seconds to those of the run: arithmetic alone, and the model behind it
report.py       text, advice, JSON
"""
