"""Entries of a quality report, made up."""


def entry(name, sqnr, *, outliers=0, clip=0.0, weight=40.0, input="int8 per tensor", group=None):
    operand = {"amax": 1.0, "clip_rate": clip, "scale": [0.1, 0.1]}
    form = "int8 per channel" if group is None else f"int4 per group:{group}"
    return {
        "name": name, "layer": 0, "module": name, "output_sqnr_db": sqnr,
        "weight": operand | {"sqnr_db": weight, "format": form},
        "input": operand | {"format": input} if input else None, "output": None, "input_amax": 1.0,
        "outliers": {"count": outliers, "worst": [[3, 12.5]][:outliers]},
    }  # fmt: skip
