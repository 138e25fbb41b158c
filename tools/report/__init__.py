"""Tables, plots and pages from the records of runs: `python -m tools.report`.

records.py     folders of records/ -> runs, groups of seeds, mean and spread
reported.py    records/reported.yaml -> what others reported, under which protocol
tables.py      both -> README's table, docs/results.md, numbers in prose
plots.py       both -> docs/*.png
add.py         the folder of a run -> a record
page.py        the folder of a run -> one HTML file
mistakes.py    weights and images -> what a network gets wrong

A front end as preview.py: it may import everything, and nothing imports it.
"""
