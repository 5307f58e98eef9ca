"""One line on each term that a run's page uses."""

from __future__ import annotations

# By the name that the page's elements refer to: how it is written, and what it means.
GLOSSARY = {
    "head": ("head", "One of the parts that attention is divided into; each looks at the text in a way of its own."),
    "kv_group": (
        "key/value group",
        "Query heads that share one key/value head. They stay or go together, so that the cache shrinks too.",
    ),
    "gate": (
        "gate",
        "A trainable switch on a head's output (hard concrete). Training opens and closes it at random, and learns how "
        "often it is open.",
    ),
    "open_probability": ("open probability", "The chance that a gate is open in one draw of training: σ(log_alpha)."),
    "l0": ("L0", "How many gates are expected to be open, summed over all layers: what the sparsity loss counts."),
    "lambda": ("λ", "What an open head costs in the loss, in nats a token. With a target there is none, and it is 0."),
    "sparsity": ("sparsity", "The share of the heads (or blocks) whose gates are closed."),
    "lm_loss": (
        "language-modelling loss",
        "Mean negative log-likelihood of a token of training text, in nats.",
    ),
    "perplexity": (
        "perplexity",
        "exp of the mean loss on text that was not trained on: among how many tokens the model seems to guess. Less is "
        "better.",
    ),
    "output_difference": (
        "output difference",
        "The size of a head's share in its layer's output, relative to the whole output. Near 0, the layer would "
        "hardly notice its removal.",
    ),
    "attention": (
        "attention pattern",
        "How a head divides its attention over the tokens before: each row adds up to 100 %. Persistent vectors, where "
        "a model has them, are learned and stand for what a feed-forward layer would know.",
    ),
    "block": ("block", "A run of hidden units of a feed-forward layer, or of persistent vectors, that is cut as one."),
    "parameters": ("parameters", "Numbers that the model consists of, shared ones counted once."),
    "flops": ("FLOPs", "Arithmetic operations of one forward pass over a token; a multiply-add counts as two."),
    "kv_cache": ("key/value cache", "Memory that one text takes while it is generated, at the length of its window."),
    "latency": ("time", "Measured on the machine of the run, all models side by side; medians."),
    "control": (
        "dense control",
        "The dense model, trained for as many steps in all as the pruned one: what the same work would have given "
        "without pruning.",
    ),
    "head_plan": ("head plan", "The list of the heads, and blocks, that stay in each layer."),
}
