"""The kernels' benchmark: `python -m kernels_pallas.bench --help`.

`cases` says what is measured, `measure` how, `kernels` and `baselines` run it, `report` writes it down.
"""
