"""The graphs that llama.cpp builds for Step-3.5, as far as memory goes: one step of the trunk, or of a head.

Follows src/models/step35.cpp and src/llama-graph.cpp of llama.cpp 0c1e57098, node by node and in the
same order: the allocator's result depends on it.
"""

from dataclasses import dataclass

from step35.planning.graph_allocator import Graph, Node
from step35.planning.model_header import LayerShape, ModelShape

F32, F16, I64 = 4, 2, 8
_ROTATION = 64


@dataclass(frozen=True, slots=True)
class Step:
    """The size of one step. `n_cells` and `n_ring_cells` count KV cells of full and of sliding layers."""

    n_tokens: int
    n_outputs: int
    n_cells: int
    n_ring_cells: int
    has_flash_attention: bool = True
    rotates_kv: bool = False
    """Whether K and V are rotated before they are stored: llama.cpp does so for quantized caches."""


def trunk_graph(shape: ModelShape, step: Step) -> Graph:
    """Returns the graph of one step through the trunk."""
    builder = _Builder(shape, step)
    tokens = builder.leaf(step.n_tokens)
    hidden = builder.node((shape.n_embd, step.n_tokens), tokens)
    builder.graph.expand(hidden)
    builder.graph.expand(builder.leaf(shape.n_embd, step.n_tokens))  # the place of embeddings given instead of tokens
    for layer in shape.trunk:
        hidden = builder.layer(layer, hidden)
    hidden.is_output = True
    builder.output(hidden, builder.leaf(step.n_outputs), norm_is_output=True)
    return builder.graph


def head_graph(shape: ModelShape, step: Step) -> Graph:
    """Returns the graph of one step of the first MTP head; all heads have the same shape."""
    builder = _Builder(shape, step)
    d, u = shape.n_embd, step.n_tokens
    tokens, state = builder.leaf(u), builder.leaf(d, u)
    embedding = builder.norm(builder.node((d, u), tokens))
    joined = builder.node((2 * d, u), embedding, builder.norm(state))
    hidden = builder.layer(shape.heads[0], builder.node((d, u), joined))
    builder.output(hidden, builder.leaf(step.n_outputs), hidden_is_output=True)
    return builder.graph


class _Builder:
    """Builds a graph from the operations that llama.cpp uses; weights take no memory here and are left out."""

    def __init__(self, shape: ModelShape, step: Step) -> None:
        self.graph = Graph()
        self.shape, self.step = shape, step
        self.positions = self.leaf(step.n_tokens)
        self.cache = Node((), 0, is_outside=True)
        self.inputs = {is_sliding: self._attention_inputs(is_sliding) for is_sliding in (False, True)}

    def _attention_inputs(self, is_sliding: bool) -> "_AttentionInputs":
        shape, step = self.shape, self.step
        n_cells = step.n_ring_cells if is_sliding else step.n_cells
        n_v = 1 if step.has_flash_attention else shape.head_dim * max(layer.n_head_kv for layer in shape.layers)
        return _AttentionInputs(
            n_cells,
            mask=self.leaf(n_cells, step.n_tokens, item_bytes=F16 if step.has_flash_attention else F32),
            k_rows=self.leaf(step.n_tokens, item_bytes=I64),
            v_rows=self.leaf(step.n_tokens * n_v, item_bytes=I64),
            k_rotation=self._rotation(_largest_rotation(shape.head_dim)),
            v_rotation=self._rotation(_ROTATION),
        )

    def _rotation(self, size: int) -> Node | None:
        can_rotate = self.step.rotates_kv and self.shape.head_dim % _ROTATION == 0
        return self.leaf(size, size) if can_rotate else None

    # operations

    def leaf(self, *dims: int, item_bytes: int = F32) -> Node:
        return Node(dims, item_bytes)

    def node(self, dims: tuple[int, ...], *sources: Node) -> Node:
        return Node(dims, F32, sources)

    def over(self, *sources: Node, dims: tuple[int, ...] | None = None) -> Node:
        """An elementwise operation, which may overwrite a source."""
        return Node(dims or sources[0].dims, F32, sources, in_place=True)

    def view(self, node: Node, *dims: int) -> Node:
        return Node(dims or node.dims, node.item_bytes, (node,), base=node.base or node)

    def norm(self, x: Node) -> Node:
        return self.over(self.over(x))

    def swiglu(self, gate: Node, up: Node, clamped: bool) -> Node:
        if not clamped:
            return self.node(gate.dims, gate, up)
        limited_up = self.over(up)
        return self.over(self.over(self.over(gate)), limited_up)

    def mlp(self, x: Node, width: int, clamped: bool) -> Node:
        dims = (width, self.step.n_tokens)
        up = self.node(dims, x)
        gate = self.node(dims, x)
        return self.node(x.dims, self.swiglu(gate, up, clamped))

    # a layer

    def layer(self, layer: LayerShape, hidden: Node) -> Node:
        x = self.norm(hidden)
        attended = self._gated(layer, x, self._attention(layer, x))
        middle = self.over(self.node(hidden.dims, attended), hidden)
        x = self.norm(middle)
        if not layer.is_moe:
            return self.over(self.mlp(x, self.shape.n_ff, layer.clamps_shared), middle)
        routed = self._experts(layer, x)
        shared = self.mlp(x, self.shape.n_ff_shared, layer.clamps_shared)
        return self.over(self.over(routed, shared), middle)

    def _attention(self, layer: LayerShape, x: Node) -> Node:
        u, head = self.step.n_tokens, self.shape.head_dim
        n_q, n_kv = layer.n_head, layer.n_head_kv
        q, k, v = (self.node((head * n, u), x) for n in (n_q, n_kv, n_kv))
        q, k, v = self.view(q, head, n_q, u), self.view(k, head, n_kv, u), self.view(v, head, n_kv, u)
        q, k = self.over(self.norm(q), self.positions), self.over(self.norm(k), self.positions)
        inputs = self.inputs[layer.is_sliding]
        q, k = self._rotated(q, inputs.k_rotation), self._rotated(k, inputs.k_rotation)
        v = self._rotated(v, inputs.v_rotation)
        for node in (q, k, v):
            self.graph.expand(node)
        for node, rows in ((k, inputs.k_rows), (v, inputs.v_rows)):
            self.graph.expand(Node((), 0, (self.view(node), rows, self.cache), base=self.cache))
        attended = self._attend(q, inputs, n_q)
        self.graph.expand(attended)
        return self._rotated(attended, inputs.v_rotation)

    def _rotated(self, x: Node, rotation: Node | None) -> Node:
        if rotation is None:
            return x
        n = rotation.dims[0]
        rows = x.n_bytes // F32 // n
        return self.view(self.node((n, rows), rotation, self.view(x, n, rows)), *x.dims)

    def _attend(self, q: Node, inputs: "_AttentionInputs", n_head: int) -> Node:
        u, head = self.step.n_tokens, self.shape.head_dim
        q, k, v = self.view(self.view(q)), self.view(self.cache), self.view(self.cache)
        if self.step.has_flash_attention:
            return self.view(self.node((head, n_head, u), q, k, v, inputs.mask), head * n_head, u)
        scores = self.node((inputs.n_cells, u, n_head), k, q)
        attended = self.node((head, u, n_head), v, self.over(scores, inputs.mask))
        return self.node((head * n_head, u), self.view(attended))

    def _gated(self, layer: LayerShape, x: Node, attended: Node) -> Node:
        u, head, n = self.step.n_tokens, self.shape.head_dim, layer.n_head
        gate = self.view(self.over(self.node((n, u), x)), 1, n, u)
        return self.view(self.over(self.view(attended, head, n, u), gate), head * n, u)

    def _experts(self, layer: LayerShape, x: Node) -> Node:
        u, n_used, d = self.step.n_tokens, self.shape.n_expert_used, self.shape.n_embd
        weights, chosen = self._route(x)
        self.graph.expand(weights)
        rows = self.view(x, d, 1, u)
        up = self.node((self.shape.n_ff_expert, n_used, u), rows, chosen)
        gate = self.node((self.shape.n_ff_expert, n_used, u), rows, chosen)
        active = self.swiglu(gate, up, layer.clamps_experts)
        experts = self.over(self.node((d, n_used, u), active, chosen), weights)
        self.graph.expand(experts)
        return self._sum(experts)

    def _route(self, x: Node) -> tuple[Node, Node]:
        u, n, n_used = self.step.n_tokens, self.shape.n_expert, self.shape.n_expert_used
        probabilities = self.over(self.node((n, u), x))
        order = self.node((n, u), self.over(probabilities))
        chosen = self.view(order, n_used, u)
        weights = self.view(self.node((1, n_used, u), self.view(probabilities, 1, n, u), chosen), n_used, u)
        total = self.over(self.node((1, u), weights))
        return self.over(self.view(self.over(weights, total), 1, n_used, u)), chosen

    def _sum(self, experts: Node) -> Node:
        dims = (self.shape.n_embd, self.step.n_tokens)
        parts = [self.view(experts, *dims) for _ in range(self.shape.n_expert_used)]
        for part in parts:
            self.graph.expand(part)
        total = parts[0]
        for part in parts[1:]:
            total = self.over(total, part)
            self.graph.expand(total)
        return total if len(parts) > 1 else self.node(dims, total)

    def output(self, hidden: Node, rows: Node, *, hidden_is_output: bool = False, norm_is_output: bool = False) -> None:
        chosen = self.node((self.shape.n_embd, self.step.n_outputs), hidden, rows)
        chosen.is_output = hidden_is_output
        normed = self.norm(chosen)
        normed.is_output = norm_is_output
        logits = self.node((self.shape.n_vocab, self.step.n_outputs), normed)
        logits.is_output = True
        self.graph.expand(logits)


@dataclass(frozen=True, slots=True)
class _AttentionInputs:
    n_cells: int
    mask: Node
    k_rows: Node
    v_rows: Node
    k_rotation: Node | None
    v_rotation: Node | None


def _largest_rotation(head_dim: int) -> int:
    """The largest power of two from 64 on that divides the head's size."""
    size = _ROTATION
    while head_dim % (2 * size) == 0:
        size *= 2
    return size
