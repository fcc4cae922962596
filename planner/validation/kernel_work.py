"""What one call of a measured kernel does, as arrays over rows, and its price on a device with a kernel library.

Every price is a sum of kernels of :class:`planner.engine.kernels.Kernels`, which the engine prices by as well; a call may be
several kernels (quantisation before a product, the two products and the permutations of a mixture of experts).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from planner.costs.attention_kernel import causal_fraction
from planner.costs.precision import dtype_bytes
from planner.engine.kernels import WIDE_HEAD, Kernels
from planner.specs.kernel_library import KernelLibrary

__all__ = ["Array", "Attention", "Experts", "Mixed", "Product", "Stream", "Work", "power_law_loads"]

Array: TypeAlias = NDArray[Any]


class Work(Protocol):
    """A kind of call; ``seconds`` prices all rows, ``take`` keeps some of them, ``read_bytes`` is what a call reads at least."""

    def take(self, keep: Array) -> Work:
        """The rows that a mask selects."""
        ...

    def read_bytes(self) -> Array:
        """Bytes of weights, keys and values per row, each read once."""
        ...

    def seconds(self, kernels: Kernels, library: KernelLibrary) -> Array:
        """Seconds per row."""
        ...


def _taken(work: Any, keep: Array) -> Any:
    """A copy of a work with the rows that a mask selects."""
    rows = {
        f.name: getattr(work, f.name)[..., keep]
        for f in fields(work)
        if isinstance(getattr(work, f.name), np.ndarray)
    }
    return replace(work, **rows)


@dataclass(frozen=True, slots=True)
class Product:
    """(m, k) by (k, n), inputs in 16 bits, quantised to ``dtype`` first where that is narrower.

    ``copies`` of the weights are used in turn before the first comes again; endlessly many leave nothing in a cache.
    """

    dtype: str
    inputs: str
    weights: str
    copies: float
    m: Array
    n: Array
    k: Array

    def take(self, keep: Array) -> Product:
        """The rows that a mask selects."""
        return cast(Product, _taken(self, keep))

    def read_bytes(self) -> Array:
        """The weights."""
        return np.asarray(dtype_bytes(self.weights) * self.n * self.k)

    def seconds(self, kernels: Kernels, library: KernelLibrary) -> Array:
        """One product, after the kernels that quantise its input."""
        stored = library["weight_bytes"] or dtype_bytes(self.weights)
        product_s = kernels.matmul_s(
            self.m, self.n, self.k, 1.0, kernels.product_flop_per_s(self.dtype) * library["rate"],
            dtype_bytes(self.inputs), 2.0, stored, self.copies * stored * self.n * self.k, library["tile"] or None,
            not library["unsplit"],
        )  # fmt: skip
        beside_s: Any = library["call_s"] + library["row_s"] * self.m + _uncounted_s(kernels, library)
        if library["quantise_bytes"]:
            beside_s = beside_s + kernels.stream_s(self.m * self.k * library["quantise_bytes"], 0.0)
        return np.asarray(product_s + beside_s)


@dataclass(frozen=True, slots=True)
class Attention:
    """``queries`` new tokens per sequence over ``keys`` in all (the new ones included), with a cache in ``stored`` dtype.

    ``decode``: whether it is the generation phase's kernel; ``passes``: 1 forward, 2.5 backward; ``cold``: whether others ran
    since the cache was last read, so that nothing of it is left on the chip; ``latent``: values are the first ``v_dim`` elements
    of the keys, and read with them.
    """

    dtype: str
    stored: str
    decode: bool
    causal: bool
    passes: float
    cold: bool
    latent: bool
    batch: Array
    heads: Array
    kv_heads: Array
    queries: Array
    keys: Array
    qk_dim: Array
    v_dim: Array
    window: Array

    def take(self, keep: Array) -> Attention:
        """The rows that a mask selects."""
        return cast(Attention, _taken(self, keep))

    def read_bytes(self) -> Array:
        """Keys and values that any query sees."""
        seen = np.minimum(self.keys, self.window + self.queries - 1.0)
        width = self.qk_dim + (0.0 if self.latent else self.v_dim)
        return np.asarray(dtype_bytes(self.stored) * self.batch * self.kv_heads * seen * width)

    def seconds(self, kernels: Kernels, library: KernelLibrary) -> Array:
        """The attention kernel and the small ones before it."""
        return np.asarray(self.core_s(kernels, library) + self.beside_s(kernels, library))

    def beside_s(self, kernels: Kernels, library: KernelLibrary) -> Array:
        """Seconds of the small kernels, and what of the main one's launch does not count."""
        cast_s = library["cast_s"] if dtype_bytes(self.stored) < dtype_bytes(self.dtype) else 0.0
        always_s = (
            library["decode_call_s" if self.decode else "call_s"] + cast_s + _uncounted_s(kernels, library)
        )
        window_s = library["decode_window_s" if self.decode else "window_s"]
        return np.asarray(always_s + window_s * np.isfinite(self.window))

    def core_s(self, kernels: Kernels, library: KernelLibrary, *, shared: bool = False) -> Array:
        """Seconds of the attention kernel itself; ``shared``: decoding inside a kernel for prompts.

        Such a kernel packs no heads that share keys into one tile, and splits no walk. It starts a block per sequence, one head
        after another: heads whose blocks run at once read their keys together, later ones read them again.
        """
        unskipped = bool(library["unskipped_window"]) and not self.decode
        window = np.full_like(self.window, np.inf) if unskipped else self.window
        keys = np.minimum(self.keys, window + self.queries - 1.0)
        width = np.maximum(np.maximum(self.qk_dim, self.v_dim) / WIDE_HEAD, 1.0)
        rate = (
            kernels.attention_flop_per_s(self.dtype, backward=self.passes != 1.0)
            * library["rate"]
            / width ** library["wide_head"]
        )
        sharing = self.heads if shared else self.kv_heads
        read = self.qk_dim / (self.qk_dim + self.v_dim) if self.latent else 1.0
        stored: Any = dtype_bytes(self.stored) * read
        if shared:
            group = self.heads / self.kv_heads
            reads = np.clip(group * self.batch / float(kernels.device.multiprocessors), 1.0, group)
            between = self.batch * keys * (self.qk_dim + self.v_dim) * stored
            stored = stored * (1.0 + kernels.moved(reads - 1.0, between)) / group
        seconds = kernels.attention_s(
            self.batch, self.heads, sharing, self.queries, keys, self.qk_dim, self.v_dim, rate,
            visible=causal_fraction(self.queries, keys, window) if self.causal else 1.0, passes=self.passes,
            bytes_per_element=dtype_bytes(self.dtype),
            kv_bytes_per_element=stored,
            split_s=np.inf if shared else library["split_s"] or None,
            splits=library["splits"] or np.inf,
            tile_share=library["decode_tile" if self.decode else "prefill_tile"],
            walk_share=library["walk"],
            working_set_bytes=np.inf if self.cold else None,
        )  # fmt: skip
        return np.asarray(seconds)


@dataclass(frozen=True, slots=True)
class Mixed:
    """One call that serves a chunk of a prompt and sequences that decode; either may be empty."""

    chunk: Attention
    decode: Attention

    def take(self, keep: Array) -> Mixed:
        """The rows that a mask selects."""
        return Mixed(self.chunk.take(keep), self.decode.take(keep))

    def read_bytes(self) -> Array:
        """Keys and values of both."""
        return np.asarray(self.chunk.read_bytes() + self.decode.read_bytes())

    def seconds(self, kernels: Kernels, library: KernelLibrary) -> Array:
        """Both parts share one launch."""
        chunk_s = self.chunk.core_s(kernels, library)
        both = (chunk_s > 0) & (self.decode.batch > 0)
        decode_s = np.where(
            both, self.decode.core_s(kernels, library, shared=True), self.decode.core_s(kernels, library)
        )
        beside_s = np.where(
            chunk_s > 0, self.chunk.beside_s(kernels, library), self.decode.beside_s(kernels, library)
        )
        return np.asarray(chunk_s + decode_s + beside_s - both * kernels.launch_s)


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of one layer on one rank: products of the tokens that each expert got.

    ``loads`` are tokens per local expert, (experts, rows), zero beyond a row's number of experts; ``choices`` are those of all
    tokens, whichever rank has the expert; ``wide`` is 2 for gated networks, whose first matrix is twice as wide.
    """

    dtype: str
    inputs: str
    weights: str
    wide: float
    tokens: Array
    hidden: Array
    ffn: Array
    choices: Array
    loads: Array

    def take(self, keep: Array) -> Experts:
        """The rows that a mask selects."""
        return cast(Experts, _taken(self, keep))

    def read_bytes(self) -> Array:
        """Weights of the experts that got a token."""
        busy = (self.loads > 0).sum(axis=0)
        return np.asarray(dtype_bytes(self.weights) * busy * (self.wide + 1.0) * self.hidden * self.ffn)

    def seconds(self, kernels: Kernels, library: KernelLibrary) -> Array:
        """Permutation, first product, activation, second product, weighted sum."""
        routed = self.loads.sum(axis=0)
        rate = kernels.product_flop_per_s(self.dtype, grouped=True) * library["rate"]
        products_s = self._product_s(kernels, library, self.wide * self.ffn, self.hidden, rate)
        products_s = products_s + self._product_s(kernels, library, self.hidden, self.ffn, rate)
        passed = self.choices if library["all_choices"] else routed
        moved = 2.0 * (self.hidden * (self.tokens + passed) + (self.wide + 1.0) * self.ffn * passed)
        moved = moved + 2.0 * self.hidden * (passed + self.tokens)
        return np.asarray(products_s + kernels.stream_s(moved, 0.0) + library["call_s"])

    def _product_s(self, kernels: Kernels, library: KernelLibrary, n: Array, k: Array, rate: float) -> Array:
        stored = library["weight_bytes"] or dtype_bytes(self.weights)
        busy = (self.loads > 0).sum(axis=0)
        routed = self.loads.sum(axis=0)
        n_bytes = busy * n * k * stored + routed * (dtype_bytes(self.inputs) * k + 2.0 * n)
        waves = np.asarray(kernels.waves(self.loads, n, tile=library["tile"] or None)).sum(axis=0)
        return np.asarray(kernels.product_s(waves, k, n_bytes, rate))


@dataclass(frozen=True, slots=True)
class Stream:
    """A memory-bound kernel that reads and writes ``moved`` bytes in all."""

    moved: Array

    def take(self, keep: Array) -> Stream:
        """The rows that a mask selects."""
        return cast(Stream, _taken(self, keep))

    def read_bytes(self) -> Array:
        """Half of what is moved."""
        return np.asarray(0.5 * self.moved)

    def seconds(self, kernels: Kernels, library: KernelLibrary) -> Array:
        """As often over its tensors, and in as many kernels, as the library goes."""
        seconds = kernels.stream_s(self.moved * library["passes"], library["launch"])
        return np.asarray(seconds + library["call_s"])


def _uncounted_s(kernels: Kernels, library: KernelLibrary) -> float:
    """What of the main kernel's launch the measurement leaves out, as a negative time."""
    return (library["launch"] - 1.0) * kernels.launch_s


def power_law_loads(tokens: float, top_k: float, experts: int, ranks: int, exponent: float) -> Array:
    """Tokens of each local expert of the fullest rank when the popularity of experts follows a power law.

    The distribution of aiconfigurator's collector (ai-dynamo/aiconfigurator, helper.py): densities ∝ x^−exponent between 1 and
    0.8·tokens (between 0.01 and 2 while there are fewer choices than experts), scaled to all choices and rounded. It draws; here
    the quantiles stand for the draw, dealt to ranks by a fixed shuffle.

    Args:
        tokens, top_k: the batch, and choices per token.
        experts, ranks: of the layer, and how many ranks share them.
        exponent: not 1.

    >>> loads = power_law_loads(4096.0, 8.0, 256, 1, 1.2)
    >>> len(loads), float(loads.sum())
    (256, 32768.0)
    """
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > experts else (0.01, 2.0)
    power = 1.0 - exponent
    quantiles = (np.arange(experts) + 0.5) / experts
    raw = (low**power + quantiles * (high**power - low**power)) ** (1.0 / power)
    loads = np.round(raw / raw.sum() * tokens * top_k)
    # A token never chooses an expert twice: what is above one choice per token goes to the next most popular.
    most = np.minimum(loads, tokens)
    for _ in range(64):
        missing = tokens * top_k - most.sum()
        room = np.flatnonzero(most < tokens)[::-1] if missing > 0 else np.flatnonzero(most > 0)[::-1]
        if missing == 0 or not len(room):
            break
        some = room[: int(min(abs(missing), len(room)))]
        most[some] += np.sign(missing) * max(1.0, abs(missing) // len(room))
        most = np.clip(most, 0.0, tokens)
    loads = most
    dealt = np.random.default_rng(0).permutation(loads).reshape(ranks, -1)
    return np.asarray(dealt[np.argmax(dealt.sum(axis=1))])
