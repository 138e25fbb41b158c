"""Tables, plots and pages from the records of runs: `python -m tools.report`.

yaml_files.py  records/*/study.yaml and records/reported.yaml, read and checked
records.py     folders of records/ -> runs, groups of seeds, mean and spread
tables.py      both -> README's tables, docs/results.md, numbers in prose (tables.md.j2)
plots.py       both -> docs/*.png
add.py         the folder of a run -> a record
page.py        the folder of a run -> one HTML file (page.html.j2)
"""
