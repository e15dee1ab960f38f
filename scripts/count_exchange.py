"""Bytes that ranks send for one layer when rows are cut over them, by counting alone: no process is started.

    python scripts/count_exchange.py --page benchmarks/context_parallel.md

Each row is a pattern: what the busiest rank sends forward and backward under hf_tfamily.distributed.context_parallel,
and how many times as much an all-gather, or a ring, of all keys and values sends.
"""

import argparse
import shlex
import sys
from pathlib import Path

from hf_tfamily import Fixed, Full, Local, PerHead, Sink, Strided, Union
from hf_tfamily.distributed import dense_bytes, predicted_bytes
from hf_tfamily.distributed.exchange_plan import Sizes, Slices, plan_exchange

MIB = 2**20
HEAD = """| pattern | route | busiest, forward | mean, forward | busiest, backward | all-gather or ring | less by |
|---|---|--:|--:|--:|--:|--:|"""


def patterns(length: int) -> list:
    """Those of the papers, with windows and blocks of the square root of the length."""
    root = round(length**0.5)
    return [
        Local(root),
        Union([Local(root), Sink(4)]),
        Fixed(root, max(1, root // 32)),
        Fixed(root, max(1, root // 32), sub_blocks=4),
        Strided(root),
        Union([Local(root), Strided(root)]),
        PerHead([Local(root), Strided(root)]),
        Full(),
    ]


def describe(pattern) -> str:
    """As one would write it, without defaults."""
    values = pattern.to_dict()
    inner = [describe(part) for part in getattr(pattern, "patterns", ())]
    said = [", ".join(inner)] if inner else [f"{name}={value}" for name, value in values.items() if name != "type"]
    return f"{type(pattern).__name__}({', '.join(said)})"


def row(pattern, args) -> str:
    given = (pattern, args.tokens, args.ranks, args.heads, args.head_dim, args.itemsize)
    forward, backward = (predicted_bytes(*given, backward=back) for back in (False, True))
    sizes = Sizes(args.heads, args.heads, args.head_dim, args.head_dim)
    routes = plan_exchange(pattern, Slices(args.tokens, args.ranks), True, sizes).routes
    route = " and ".join(dict.fromkeys("keys" if route.columns is None else "columns" for route in routes))
    dense = dense_bytes(args.tokens, args.ranks, args.heads, args.head_dim, args.itemsize)
    sent = [max(forward), sum(forward) / len(forward), max(backward), dense]
    cells = " | ".join(f"{number / MIB:,.{3 if number < 100 * MIB else 4}g} MiB" for number in sent)
    return f"| `{describe(pattern)}` | {route} | {cells} | **{dense / max(forward):,.3g}** |"


def page(args, command: str) -> str:
    what = f"{args.tokens:,} tokens on {args.ranks} ranks, {args.heads} heads of {args.head_dim}, {args.itemsize} bytes"
    table = "\n".join([HEAD, *(row(pattern, args) for pattern in patterns(args.tokens))])
    return f"""# What ranks send under context parallelism

```
{command}
```

Causal attention of one row of {what} a number, one layer.
Nothing was run or timed: these are counts, which the tests hold to the bytes that two and four processes really send.
"Less by" compares the busiest rank forward with an all-gather, or a ring, of all keys and values, in which every rank
sends that much. [How it works](../docs/context_parallel.md).

{table}

Routes: `keys` sends each rank the keys that its queries see; `columns` sends queries, keys and values to the rank that
has their column, and outputs back. Full attention needs all earlier keys: the first rank sends as much as in an
all-gather, the last nothing, and the mean is half.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--itemsize", type=int, default=2, help="bytes of a number")
    parser.add_argument("--page", type=Path, help="write the table there, too")
    args = parser.parse_args()
    text = page(args, shlex.join(["python", "scripts/count_exchange.py", *sys.argv[1:]]))
    print(text)
    if args.page:
        args.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
