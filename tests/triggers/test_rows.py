"""Random numbers that belong to a row."""

import torch

from backdoor_bench.triggers.rows import uniform_of_rows


def test_a_row_has_the_same_numbers_in_any_batch():
    index = torch.tensor([5, 0, 10_000_000, 7])
    together = uniform_of_rows(3, "mask", index, 6)
    for place, row in enumerate(index):
        assert torch.equal(uniform_of_rows(3, "mask", row[None], 6)[0], together[place])
    assert torch.equal(uniform_of_rows(3, "mask", index, 4), together[:, :4])


def test_seed_purpose_row_and_place_all_matter():
    index = torch.arange(3)
    base = uniform_of_rows(0, "mask", index, 3)
    assert len(base.unique()) == 9
    for other in (uniform_of_rows(1, "mask", index, 3), uniform_of_rows(0, "warp", index, 3)):
        assert not (base == other).any()


def test_numbers_are_uniform():
    numbers = uniform_of_rows(0, "mask", torch.arange(1000), 100)
    assert numbers.dtype == torch.float64
    assert 0 <= numbers.min() < 1e-3
    assert 0.999 < numbers.max() < 1
    counts = torch.histc(numbers.float(), 10, 0, 1)
    assert (counts - 10_000).abs().max() < 4 * 95  # four standard deviations of a binomial
    neighbours = torch.corrcoef(torch.stack([numbers[:-1].flatten(), numbers[1:].flatten()]))[0, 1]
    assert neighbours.abs() < 0.013


def test_the_hash_is_splitmix64():
    # First output of SplitMix64 for state 0 is 0xE220A8397B1DCDAF (the generator's published reference value).
    from backdoor_bench.triggers.rows import _mixed

    assert int(_mixed(torch.tensor([0]))[0]) % 2**64 == 0xE220A8397B1DCDAF
