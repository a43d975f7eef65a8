"""
Plugging into a transformer
===========================

Attention is one call in a model, and that call can be replaced. The encoder on this
page is small and written in NumPy, so that nothing has to be downloaded; the last
section replaces the call in a real model.
"""

# %%
# An encoder that takes its attention as an argument
# --------------------------------------------------
# Two layers of four heads, with the weights of a model before training. The page shows
# where attention is called, and how its error propagates through later layers.

import matplotlib.pyplot as plt
import numpy as np

import fastattn

rng = np.random.default_rng(0)
n, width, heads = 8192, 64, 4


def matrix(rows, columns):
    return rng.standard_normal((rows, columns)).astype(np.float32) / rows**0.5


layers = [
    {
        "qkv": [matrix(width, width) for _ in range(3)],
        "out": matrix(width, width),
        "up": matrix(width, 4 * width),
        "down": matrix(4 * width, width),
    }
    for _ in range(2)
]


def normalised(x):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / x.std(axis=-1, keepdims=True)


def encode(x, attend):
    """Two layers; ``attend`` takes three (heads, n, d) arrays and returns one."""
    for layer in layers:
        seen = normalised(x)
        split = [
            (seen @ w).reshape(n, heads, -1).transpose(1, 0, 2) for w in layer["qkv"]
        ]
        mixed = attend(*split).transpose(1, 0, 2).reshape(n, width)
        x = x + mixed @ layer["out"]
        x = x + np.maximum(normalised(x) @ layer["up"], 0) @ layer["down"]
    return normalised(x)


# %%
# Tokens clustered by topic, as in text:

topics = rng.standard_normal((20, width))
tokens = topics[rng.integers(20, size=n)] + 1.5 * rng.standard_normal((n, width))
tokens = tokens.astype(np.float32)

# %%
# The same model, exactly and to a tolerance
# ------------------------------------------


def exactly(*arrays):
    return fastattn.attention(*arrays, method=fastattn.Exact(), rng=0)


wanted = encode(tokens, exactly)
tols = (0.3, 0.1, 0.05, 0.03)
worst, whole = [], []

for tol in tols:
    plans, bounds = [], []

    def to_tolerance(*arrays, tol=tol, plans=plans, bounds=bounds):
        answer = fastattn.approximate(*arrays, tol=tol, rng=0)
        plans.extend(answer.plan)
        bounds.extend(answer.certificate.error)
        return answer.value

    got = encode(tokens, to_tolerance)
    worst.append(max(bounds))
    whole.append(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    names = [type(plan.method).__name__ for plan in plans]
    counts = {name: names.count(name) for name in sorted(set(names))}
    print(f"tol {tol:4g}: worst head {worst[-1]:.1e}, model {whole[-1]:.1e}, {counts}")

figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.loglog(tols, tols, "k:", label="tolerance")
axes.loglog(tols, worst, "o-", label="worst certificate of a head")
axes.loglog(tols, whole, "s--", label="measured at the end of the model")
axes.set(xlabel="tolerance", ylabel="relative error")
axes.legend()
plt.show()

# %%
# A certificate is about one call: the heads of one layer. The effect of that error on
# the output of a model depends on the rest of the model, and nothing here bounds the
# effect. In practice it is measured, as above: at each tolerance, against exact
# attention.
#
# With torch and transformers
# ---------------------------
# ``examples/transformer_heads.py`` registers the call with transformers, as
# ``AttentionInterface.register("fastattn", attend)``, and runs all-MiniLM-L6-v2 on a
# sequence of thousands of tokens. NumPy views share the memory of tensors on the CPU,
# so that nothing is copied. Sentences of different lengths are padded. With
# ``AttentionMaskInterface.register("fastattn", flash_attention_mask)`` the mask is the
# padding mask of the tokens, ``(batch, n)``, and ``[:, None]`` broadcasts it over the
# heads of a sentence. Without the mask tokens would attend to padding, and the
# embeddings would be wrong:
#
# .. code-block:: python
#
#    def attend(module, query, key, value, attention_mask, scaling=None, **_):
#        arrays = [x.detach().numpy() for x in (query, key, value)]
#        seen = None
#        if attention_mask is not None:
#            seen = attention_mask.bool().numpy()[:, None]
#        out = fastattn.attention(*arrays, tol=0.05, scale=scaling, key_mask=seen)
#        return torch.from_numpy(out).transpose(1, 2), None
#
# The script prints a table of the heads. This is one run on one thread, the first of
# six layers:
#
# .. literalinclude:: ../transformer_heads.txt
#    :language: text
#    :class: wide
#    :lines: 1-21, 105-107
#
# For training, :func:`fastattn.attention_vjp` computes the gradients:
# ``examples/torch_autograd.py`` has the ``torch.autograd.Function``.
