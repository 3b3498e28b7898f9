"""Which of the requests of vLLM's batch need no cache; for `_vllm_backend`, from plain tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """The requests at the end of a batch that have all their keys in it.

    Attributes:
        first: index of the first of these requests.
        first_token: its first token.
        query_start_loc: int32, the first token of each, counted from first_token, and the end.
        max_query_len: of these requests.
        max_query_len_before: of the requests before them; 0 = there are none.
    """

    first: int
    first_token: int
    query_start_loc: Tensor
    max_query_len: int
    max_query_len_before: int


def prompts_at_end(
    num_reqs: int,
    max_query_len: int,
    query_start_loc: Tensor,
    query_start_loc_cpu: Tensor,
    seq_lens_bound: Tensor | None,
) -> Prompts | None:
    """The whole prompts with which a batch ends.

    Args:
        num_reqs: number of requests.
        max_query_len: the largest number of new tokens of a request or more.
        query_start_loc: int32 [num_reqs + 1].
        query_start_loc_cpu: the same on the host.
        seq_lens_bound: [num_reqs] on the host, keys of each request: exact while its prompt is
            computed, else exact or too many. None = not known.

    Returns:
        None where the last request is none, or where the host does not know.
    """
    if seq_lens_bound is None or max_query_len == 1:
        return None
    starts = query_start_loc_cpu[: num_reqs + 1]
    query_lens = starts.diff()
    others = (query_lens != seq_lens_bound[:num_reqs]).nonzero()
    first = int(others[-1]) + 1 if len(others) else 0
    if first == num_reqs:
        return None
    first_token = int(starts[first])
    return Prompts(
        first,
        first_token,
        query_start_loc[first : num_reqs + 1] - first_token,
        int(query_lens[first:].max()),
        int(query_lens[:first].max()) if first else 0,
    )
