"""How much memory a compute graph takes: ggml's graph allocator, replayed on sizes alone.

Follows ggml/src/ggml-alloc.c (ggml_gallocr_alloc_graph_impl, ggml_dyn_tallocr_alloc): nodes in the
order they were added, best fit into freed blocks, operations in place where ggml allows it.
"""

from bisect import insort
from dataclasses import dataclass, field

ALIGNMENT = 32


@dataclass(slots=True, eq=False)
class Node:
    """A tensor of a graph, as the allocator sees it.

    Views and tensors that live elsewhere (weights, KV cache) take no memory of the graph.
    """

    dims: tuple[int, ...]
    item_bytes: int
    sources: tuple["Node", ...] = ()
    base: "Node | None" = None
    """What a view shows."""
    in_place: bool = False
    """Whether ggml may write the result over a source."""
    is_outside: bool = False
    is_output: bool = False
    n_children: int = 0
    n_views: int = 0
    offset: int = -1
    """Where the node lies; -1 while it has no memory of its own."""

    @property
    def n_bytes(self) -> int:
        n = self.item_bytes
        for size in self.dims:
            n *= size
        return -(-n // ALIGNMENT) * ALIGNMENT


@dataclass(slots=True)
class Graph:
    """A graph being built; `expand` adds a node after everything it needs, as ggml_build_forward_expand."""

    nodes: list[Node] = field(default_factory=list)
    leaves: list[Node] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)

    def expand(self, node: Node) -> None:
        if id(node) in self._seen:
            return
        self._seen.add(id(node))
        for source in node.sources:
            self.expand(source)
        is_leaf = not node.sources and node.base is None
        (self.leaves if is_leaf else self.nodes).append(node)


def n_bytes(graph: Graph) -> int:
    """Returns the size of the compute buffer that the graph needs. Uses the graph up."""
    arena = _Arena()
    for leaf in graph.leaves:
        _place(arena, leaf)
    for node in graph.nodes:
        if node.base is not None:
            node.base.n_views += 1
        for source in node.sources:
            source.n_children += 1
    for node in graph.nodes:
        _place(arena, node)
        for source in node.sources:
            _release(arena, source)
    return arena.peak


def _place(arena: "_Arena", node: Node) -> None:
    if node.is_outside or node.base is not None or node.offset >= 0:
        return
    host = next((s for s in node.sources if _can_host(s, node)), None) if node.in_place else None
    if host is None:
        node.offset = arena.take(node.n_bytes)
    else:
        node.offset, host.offset = host.offset, -1


def _can_host(source: Node, node: Node) -> bool:
    is_free = source.n_children == 1 and source.n_views == 0 and not source.is_output
    same = source.dims == node.dims and source.item_bytes == node.item_bytes
    return is_free and same and source.offset >= 0 and source.base is None


def _release(arena: "_Arena", source: Node) -> None:
    source.n_children -= 1
    if source.n_children or source.n_views:
        return
    owner = source
    if source.base is not None:
        owner = source.base
        owner.n_views -= 1
    if not owner.n_views and not owner.n_children and owner.offset >= 0 and not owner.is_output:
        arena.give(owner.offset, owner.n_bytes)
        owner.offset = -1


@dataclass(slots=True)
class _Arena:
    """One growing buffer; `holes` are its free (offset, size) blocks before `end`, in order."""

    holes: list[tuple[int, int]] = field(default_factory=list)
    end: int = 0
    peak: int = 0

    def take(self, size: int) -> int:
        # ggml takes the last of several holes of the best size
        fits = [(hole[1], -hole[0]) for hole in self.holes if hole[1] >= size]
        if not fits:
            offset, self.end = self.end, self.end + size
            self.peak = max(self.peak, self.end)
            return offset
        found, offset = min(fits)[0], -min(fits)[1]
        self.holes.remove((offset, found))
        if found > size:
            insort(self.holes, (offset + size, found - size))
        return offset

    def give(self, offset: int, size: int) -> None:
        for hole in [h for h in self.holes if h[0] + h[1] == offset or h[0] == offset + size]:
            self.holes.remove(hole)
            offset, size = min(offset, hole[0]), size + hole[1]
        if offset + size == self.end:
            self.end = offset
        else:
            insort(self.holes, (offset, size))
