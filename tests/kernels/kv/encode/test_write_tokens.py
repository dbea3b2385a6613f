"""One function writes pages, of one layer or of several."""

import torch

from rotq_kernels.kv.encode.reference import write_tokens


def test_tokens_of_several_layers_go_to_their_own_slots() -> None:
    """Layers of 2 and 1 heads, pages of 16 tokens; the second token has no slot."""
    new_BHT = torch.arange(1, 10).view(1, 3, 3)
    two_PHS, one_PHS = torch.zeros(2, 2, 16, dtype=torch.int64), torch.zeros(2, 1, 16).long()
    write_tokens([(new_BHT, [two_PHS, one_PHS]), (None, [None])], torch.tensor([[17, -1, 3]]), 16)
    assert two_PHS[1, :, 1].tolist() == [1, 4]
    assert two_PHS[0, :, 3].tolist() == [3, 6]
    assert (one_PHS[1, 0, 1], one_PHS[0, 0, 3]) == (7, 9)
    assert (two_PHS.count_nonzero(), one_PHS.count_nonzero()) == (4, 2)
