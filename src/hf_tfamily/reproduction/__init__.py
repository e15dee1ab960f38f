"""A paper's claim by one command: `hf-tfamily reproduce transformer_xl_memory`.

A claim is a module of `hf_tfamily.claims`: what the paper says, an experiment, and a criterion written before it was
run. `reproduce` runs the experiment and says what it found.

    finding = reproduce("transformer_xl_memory")
    finding.verdict      # found, not found at this size, or other than claimed
"""

from .claim import Claim, Figures, Finding, Result, Results, Verdict, all_of, compare, of_recipe
from .run import ClaimError, list_claims, load_claim, reproduce
from .workspace import Workspace

__all__ = [
    "Claim",
    "ClaimError",
    "Figures",
    "Finding",
    "Result",
    "Results",
    "Verdict",
    "Workspace",
    "all_of",
    "compare",
    "list_claims",
    "load_claim",
    "of_recipe",
    "reproduce",
]
