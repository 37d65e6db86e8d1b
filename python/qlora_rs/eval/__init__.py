"""What a model is worth: perplexity on a text, what data types cost of it, and answers to a prompt."""

from __future__ import annotations

from qlora_rs.eval.generation import Generation, generate
from qlora_rs.eval.mode import evaluating
from qlora_rs.eval.perplexity import Perplexity, perplexity
from qlora_rs.eval.types import TypeComparison, TypeResult, compare_types

__all__ = [
    "Generation",
    "Perplexity",
    "TypeComparison",
    "TypeResult",
    "compare_types",
    "evaluating",
    "generate",
    "perplexity",
]
