"""The page that compile_kernels.py writes: what each entry of the configuration table takes, by version of Triton."""

from collections.abc import Iterable

INTRODUCTION = """# What the Triton kernels compile to

Made without a GPU by

```
python -m tests.block_sparse.compile_kernels --output benchmarks/triton_compile
```

in an environment of each version of Triton. A cell has the tile (queries x keys, warps w, stages s, < the bound of
registers where one is set, ieee where float32 products are multiply-adds rather than three TF32 products), then the
most registers of a thread and the most shared memory of a block over all that a call can ask of this entry: what
columns it walks over, bfloat16 or float16, padding, first or later launch. Nothing may spill; a bold cell would.
"""


def page(record: dict[str, list[dict]]) -> str:
    """`record`: for each version the configurations with what they take."""
    lines = [INTRODUCTION]
    for version, rows in sorted(record.items()):
        spilling, most = sum(row["stack"] > 0 for row in rows), max(row["stack"] for row in rows)
        lines += [f"## Triton {version}: {len(rows)} configurations, {spilling} that spill, at most {most} bytes", ""]
        for arch in sorted({row["arch"] for row in rows}):
            chosen = [row for row in rows if row["arch"] == arch]
            lines += [f"### sm_{arch}, at most {max(row['shared'] for row in chosen) / 1024:.0f} KiB", ""]
            lines += table(chosen)
    return "\n".join(lines)


def table(rows: list[dict]) -> list[str]:
    """One line for each kernel, walk and width of numbers; one column for each pair of head dimensions."""
    all_dims = list(dict.fromkeys(tuple(row["dims"]) for row in rows))
    names = [f"{dim}" if dim == value_dim else f"{dim} / {value_dim}" for dim, value_dim in all_dims]
    lines = [f"| kernel | walk | bits | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["walk"], 32 if row["dtype"] == "fp32" else 16), []).append(row)
    for (kernel, walk, bits), group in groups.items():
        cells = (cell(row for row in group if tuple(row["dims"]) == dims) for dims in all_dims)
        lines.append(f"| {kernel} | {walk} | {bits} | {' | '.join(cells)} |")
    return [*lines, ""]


def cell(rows: Iterable[dict]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    registers, stack, shared = (max(row[name] for row in rows) for name in ("registers", "stack", "shared"))
    block_m, block_n, warps, stages, bound, precision = rows[0]["tile"]
    special = (f" <{bound}" if bound else "") + (f" {precision}" if precision == "ieee" else "")
    text = f"{block_m} x {block_n} {warps}w {stages}s{special}: {registers}, {-(-shared // 1024)} KiB"
    return f"**{text}, {stack} B of stack**" if stack else text
