"""The one decoder behind every family: RMSNorm, rotary grouped-query attention, SwiGLU, layers stacked and scanned.

NNX modules live here and nowhere else. Outside, a model is a `DecoderConfig`, a pytree of parameters (nested dicts, dims as in
`parameter_dims`) and pure functions: `init_params`, `hidden_states`, `logits`, and `unrolled_states` for generation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from phased_ift_jax.models.attention import Rope, implementation, kernel, rotate, rotations
from phased_ift_jax.sharding import constrain, gather, per_device

Params = dict[str, Any]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # queries, keys, values; what is masked, it knows


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and numbers of one model; the letters are the house's legend."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    rope: Rope = Rope()  # noqa: RUF009 - frozen
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    qkv_bias: bool = False  # queries, keys and values each have a bias
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    @property
    def matmul_parameters(self) -> int:
        """Parameters that every token is multiplied with: all but the input embedding's lookup, norms and biases."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size) + self.vocab_size * self.hidden_size

    def train_flops(self, tokens: int, attended: int) -> float:
        """Floating-point operations of forward and backward: 6 per parameter and token, 12 N H L per (query, key) pair attended."""
        return 6.0 * self.matmul_parameters * tokens + 12.0 * self.num_layers * self.num_heads * self.head_dim * attended


@dataclass(frozen=True)
class Compute:
    """How a model is computed. What is computed does not depend on it, but for rounding."""

    dtype: str | None = None  # of weights and activations; None: as the parameters are
    gradient_checkpointing: str = "none"
    attn_implementation: str = "auto"
    mesh: Mesh | None = None  # None: one device, a CPU's

    def kernel_of(self, config: DecoderConfig) -> str:
        """The name of the attention kernel that is used for a model, given a `dtype`."""
        return implementation(self.attn_implementation, self.platform, config.head_dim, self.dtype)[0]

    @property
    def platform(self) -> str:
        """That of the devices that will compute, whatever this process has."""
        return "cpu" if self.mesh is None else str(self.mesh.devices.flat[0].platform)


def parameter_dims(config: DecoderConfig) -> dict[str, Any]:
    """The dims of every parameter, in the legend's letters, as the tree that `init_params` makes."""
    biases = {"q_bias": "LNH", "k_bias": "LKH", "v_bias": "LKH"} if config.qkv_bias else {}
    layers = {
        "attention": {"q": "LNHD", "k": "LKHD", "v": "LKHD", "o": "LNHD"} | biases,
        "mlp": {"gate": "LDF", "up": "LDF", "down": "LFD"},
        "attention_norm": "LE",
        "mlp_norm": "LE",
    }
    head = {} if config.tie_word_embeddings else {"lm_head": "DV"}
    return {"embed": "VD", "layers": layers, "norm": "E"} | head


def parameter_shapes(config: DecoderConfig, dtype: jnp.dtype) -> Params:
    """The same tree as `jax.ShapeDtypeStruct`s."""
    c = config
    sizes = {"V": c.vocab_size, "D": c.hidden_size, "E": c.hidden_size, "F": c.intermediate_size, "L": c.num_layers, "N": c.num_heads, "K": c.num_kv_heads, "H": c.head_dim}
    return jax.tree.map(lambda dims: jax.ShapeDtypeStruct(tuple(sizes[letter] for letter in dims), dtype), parameter_dims(config))


def init_params(config: DecoderConfig, key: jax.Array, dtype: jnp.dtype) -> Params:
    """Random parameters as transformers draws them: normal with `initializer_range`, norms at one, biases at zero. Jit it with out_shardings."""
    shapes, structure = jax.tree.flatten(parameter_shapes(config, dtype))
    dims = jax.tree.leaves(parameter_dims(config))
    keys = jax.random.split(key, len(shapes))
    leaves = [
        (config.initializer_range * jax.random.normal(k, leaf.shape, jnp.float32)).astype(dtype) if is_matrix(letters) else jnp.full(leaf.shape, letters.endswith("E"), dtype)
        for k, leaf, letters in zip(keys, shapes, dims, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def is_matrix(dims: str) -> bool:
    """Whether a parameter of these dims is a matrix, of each layer or of each head: not a norm's scale, not a bias. Matrices have the model's width."""
    return "D" in dims


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, the mean square in at least float32 (Zhang and Sennrich, 2019; rounding as in transformers)."""

    def __init__(self, scale: Any, eps: float) -> None:
        self.scale = nnx.Param(scale)
        self.eps = eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_RD = x_BTD.reshape(-1, x_BTD.shape[-1])  # as a matrix: on CPUs XLA's sums over one of three dims take eight times as long
        wide = x_RD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (self.scale[...] * normed.astype(x_BTD.dtype)).reshape(x_BTD.shape)


@jax.custom_vjp
def widened(x_BTD: jax.Array, weight_DF: jax.Array) -> jax.Array:
    """x @ weight. Of the weight's gradient a CPU copies the operand that is read transposed: here x, narrower than what comes of it, or shared."""
    return jnp.einsum("BTD,DF->BTF", x_BTD, weight_DF)


def _widened_backward(kept: tuple[jax.Array, jax.Array], gradient_BTF: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTD, weight_DF = kept
    return jnp.einsum("BTF,DF->BTD", gradient_BTF, weight_DF), jnp.einsum("BTD,BTF->DF", x_BTD, gradient_BTF)


# the product as it stands: hidden in a call, it is no matmul to a policy that saves matmuls
widened.defvjp(lambda x_BTD, weight_DF: (jnp.einsum("BTD,DF->BTF", x_BTD, weight_DF), (x_BTD, weight_DF)), _widened_backward)


def into_heads(x_BTD: jax.Array, weight_NHD: jax.Array) -> jax.Array:
    """x (B, T, D) times a weight of each head, (B, T, N, H); as one matrix, which a matmul reads as it lies: one of three dims a CPU turns, at every token anew."""
    return widened(x_BTD, weight_NHD.reshape(-1, x_BTD.shape[-1]).T).reshape(*x_BTD.shape[:2], *weight_NHD.shape[:2])


def out_of_heads(x_BTNH: jax.Array, weight_NHD: jax.Array) -> jax.Array:
    """The way back, summed over heads, (B, T, D)."""
    return jnp.einsum("BTE,ED->BTD", x_BTNH.reshape(*x_BTNH.shape[:2], -1), weight_NHD.reshape(-1, weight_NHD.shape[-1]))


class Heads(nnx.Module):
    """From the model's width to heads, with a bias where the family has one."""

    def __init__(self, params: Params, name: str) -> None:
        self.weight = nnx.Param(params[name])
        self.bias = nnx.Param(params[f"{name}_bias"]) if f"{name}_bias" in params else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        y_BTNH = into_heads(x_BTD, self.weight[...])
        return y_BTNH if self.bias is None else y_BTNH + self.bias[...]


class Attention(nnx.Module):
    """Projections around attention."""

    def __init__(self, params: Params) -> None:
        self.q, self.k, self.v = (Heads(params, name) for name in "qkv")
        self.o = nnx.Param(params["o"])

    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        q_BTNH, k_BTKH = (rotate(heads(x_BTD), context.rotation) for heads in (self.q, self.k))
        return out_of_heads(context.attend(q_BTNH, k_BTKH, self.v(x_BTD)), self.o[...])


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, params: Params) -> None:
        self.gate, self.up, self.down = (nnx.Param(params[name]) for name in ("gate", "up", "down"))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF, up_BTF = widened(x_BTD, self.gate[...]), widened(x_BTD, self.up[...])
        return jnp.einsum("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, self.down[...])


class Layer(nnx.Module):
    """One pre-norm block. `Decoder` holds all of them as one, with a leading L on every parameter, and scans."""

    def __init__(self, config: DecoderConfig, params: Params) -> None:
        self.attention_norm = RMSNorm(params["attention_norm"], config.rms_norm_eps)
        self.attention = Attention(params["attention"])
        self.mlp_norm = RMSNorm(params["mlp_norm"], config.rms_norm_eps)
        self.mlp = MLP(params["mlp"])

    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), context)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Context(NamedTuple):
    """What a layer is given beside its input."""

    rotation: tuple[jax.Array, jax.Array]
    attend: Attend


UNROLLED = 8  # layers at most that a CPU computes one by one, where nothing is recomputed: scanned, it copies what each leaves for its gradient
POLICIES = {
    # gathered or rounded weights are made again: kept, they would be a copy of the model on every device
    "none": jax.checkpoint_policies.save_anything_except_these_names("gathered"),
    "save_attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "save_dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Decoder(nnx.Module):
    """Embedding, layers and final norm; the head is `logits`, apart, so that a loss can apply it in chunks."""

    def __init__(self, config: DecoderConfig, params: Params, compute: Compute) -> None:
        self.config = config
        self.compute = compute
        self.dtype = jnp.dtype(compute.dtype or params["embed"].dtype)
        self.embed = nnx.Param(params["embed"])
        self.layers = nnx.data(params["layers"])  # each with a leading L, and a `Layer` is made of a slice of them; or a list of such slices
        self.norm = RMSNorm(params["norm"].astype(self.dtype), config.rms_norm_eps)

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, attend: Attend | Sequence[Attend]) -> jax.Array:
        """`attend` is that of all layers, which are then scanned (few of them, on a CPU, are not), or has one for each layer of a list."""
        mesh, dtype = self.compute.mesh, self.dtype
        # the table stays split by width: each device looks up its part of every row, and only the rows change places
        embedded_RTD = constrain(jnp.take(self.embed[...], constrain(tokens_BT, "RT", mesh), axis=0).astype(dtype), "RTD", mesh)
        rotation = rotations(self.config.rope, self.config.head_dim, positions_BT, dtype)
        dims = jax.tree.map(lambda letters: letters.removeprefix("L"), parameter_dims(self.config)["layers"])

        def body(x_BTD: jax.Array, layer: Params, attend: Attend) -> jax.Array:
            params = jax.tree.map(lambda weight, letters: gather(weight, letters, dtype, mesh), layer, dims)
            return constrain(Layer(self.config, params)(x_BTD, Context(rotation, attend)), "BTD", mesh)

        x_BTD = constrain(embedded_RTD, "BTD", mesh)
        if isinstance(attend, Sequence):
            for layer, own in zip(self.layers, attend, strict=True):
                x_BTD = body(x_BTD, layer, own)
            return self.norm(x_BTD)
        scanned: Callable[..., jax.Array] = functools.partial(body, attend=attend)
        if self.compute.gradient_checkpointing != "none" or dtype != self.embed[...].dtype or (mesh is not None and mesh.shape["fsdp"] > 1):
            scanned = jax.checkpoint(scanned, policy=POLICIES[self.compute.gradient_checkpointing], prevent_cse=False)
        elif self.compute.platform == "cpu" and self.config.num_layers <= UNROLLED:
            for at in range(self.config.num_layers):
                x_BTD = scanned(x_BTD, jax.tree.map(lambda weight, at=at: weight[at], self.layers))
            return self.norm(x_BTD)
        return self.norm(jax.lax.scan(lambda x_BTD, layer: (scanned(x_BTD, layer), None), x_BTD, self.layers)[0])


def hidden_states(
    config: DecoderConfig, params: Params, tokens_BT: jax.Array, segments_BT: jax.Array, positions_BT: jax.Array, compute: Compute = Compute()
) -> jax.Array:
    """The final normed states (B, T, D) of packed rows; examples (equal segment numbers) attend as if each were alone."""
    attention = functools.partial(kernel(compute.attn_implementation, compute.platform, config.head_dim, compute.dtype or params["embed"].dtype), window=config.sliding_window)

    def inside(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        return per_device(attention, (q_BTNH, k_BTKH, v_BTKH, segments_BT), ("BTNH", "BTKH", "BTKH", "BT"), compute.mesh)

    return Decoder(config, params, compute)(tokens_BT, positions_BT, inside)


def unrolled(params: Params, give_up: bool = False) -> Params:
    """The same parameters with a list of layers, for `unrolled_states`: each layer's buffers are its own, and none is cut out again at every token.

    With `give_up` those given are freed one by one, so that the model is hardly ever held twice.
    """

    @jax.jit
    def cut(weight: jax.Array) -> list[jax.Array]:
        return list(weight)

    def one(weight: jax.Array) -> list[jax.Array]:
        layers = jax.block_until_ready(cut(weight))
        if give_up:
            weight.delete()
        return layers

    stacked, structure = jax.tree.flatten(params["layers"])
    return params | {"layers": [jax.tree.unflatten(structure, layer) for layer in zip(*map(one, stacked), strict=True)]}


def unrolled_states(config: DecoderConfig, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array, attends: Sequence[Attend], compute: Compute) -> jax.Array:
    """The final normed states (B, T, D), layer by layer, each with an attention of its own, which may know a cache; `params` as `unrolled` gives them."""
    return Decoder(config, params, compute)(tokens_BT, positions_BT, attends)


def unembedding(config: DecoderConfig, params: Params) -> tuple[jax.Array, str]:
    """The matrix that turns hidden states into logits, as it is stored, and its dims: DV, or VD where it is the embedding's."""
    return (params["embed"], "VD") if config.tie_word_embeddings else (params["lm_head"], "DV")


def logits(config: DecoderConfig, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """Logits (B, T, V), accumulated in at least float32."""
    head, dims = unembedding(config, params)
    return jnp.einsum(f"BTD,{dims}->BTV", hidden_BTD, head, preferred_element_type=jnp.promote_types(hidden_BTD.dtype, jnp.float32))
