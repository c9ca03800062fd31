"""The noise is uniform and a function of its four arguments; sampling follows the softmax, token by token."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from qspin.errors import QspinError
from qspin.sampling import noise_key, sample, uniform


def numbers(count: int, seed: int = 0) -> torch.Tensor:
    """(count,) fp64: position 0 of so many completions, as generation draws them."""
    return torch.tensor([uniform(noise_key(seed, 0, f"row-{i}"), 0) for i in range(count)], dtype=torch.float64)


def chi_square(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    total = sum(counts)
    return sum((n - total * p) ** 2 / (total * p) for n, p in zip(counts, probabilities, strict=True))


def critical(degrees: int) -> float:
    """What chi-square exceeds once in a thousand times (Wilson and Hilferty's approximation, within 0.2% here)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.0902 * math.sqrt(2 / (9 * degrees))) ** 3


def draw(logits: Sequence[float], uniforms: torch.Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> list[int]:
    """A token for each number, all from the same logits."""
    rows = torch.tensor(logits, dtype=torch.float32).expand(len(uniforms), -1)
    tokens: list[int] = sample(rows, uniforms, temperature=temperature, top_p=top_p).tolist()
    return tokens


def counts_of(tokens: Sequence[int], vocabulary: int) -> list[int]:
    counted = Counter(tokens)
    assert set(counted) <= set(range(vocabulary))
    return [counted[token] for token in range(vocabulary)]


def grid(count: int) -> torch.Tensor:
    """(count,) the middles of so many equal parts of [0, 1)."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


# --- noise ---


def test_noise_is_splitmix64() -> None:
    # the published first outputs of splitmix64 from state 0, their 53 upper bits as a fraction
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [uniform(0, position) for position in range(3)] == [(z >> 11) / 2**53 for z in published]


def test_noise_is_in_the_half_open_unit_interval() -> None:
    drawn = [uniform(noise_key(s, 0, "a"), p) for s in range(20) for p in range(500)]
    assert all(0 <= u < 1 for u in drawn)
    # the largest value there can be stays below 1
    assert ((2**64 - 1) >> 11) * 2.0**-53 == 1 - 2**-53


def test_noise_depends_on_each_of_its_arguments() -> None:
    base = uniform(noise_key(0, 0, "row-1"), 0)
    others = {
        "seed": uniform(noise_key(1, 0, "row-1"), 0),
        "iteration": uniform(noise_key(0, 1, "row-1"), 0),
        "example": uniform(noise_key(0, 0, "row-2"), 0),
        "position": uniform(noise_key(0, 0, "row-1"), 1),
    }
    assert uniform(noise_key(0, 0, "row-1"), 0) == base
    assert len({base, *others.values()}) == 5


def test_arguments_do_not_run_into_one_another() -> None:
    assert len({noise_key(1, 23, "4"), noise_key(12, 3, "4"), noise_key(1, 2, "34"), noise_key(123, 4, "")}) == 4


@pytest.mark.parametrize("along", ["seed", "iteration", "example", "position"])
def test_noise_is_uniform_along_each_argument(along: str) -> None:
    # Kolmogorov and Smirnov: √n·D exceeds 1.95 once in a thousand times
    count = 4000
    drawn = sorted(
        {
            "seed": lambda i: uniform(noise_key(i, 0, "a"), 0),
            "iteration": lambda i: uniform(noise_key(0, i, "a"), 0),
            "example": lambda i: uniform(noise_key(0, 0, str(i)), 0),
            "position": lambda i: uniform(noise_key(0, 0, "a"), i),
        }[along](i)
        for i in range(count)
    )
    distance = max(max((i + 1) / count - u, u - i / count) for i, u in enumerate(drawn))
    assert math.sqrt(count) * distance < 1.95


def test_neighbouring_positions_are_independent() -> None:
    # 10 × 10 cells of (number, next number): uniform margins are not enough, an LCG with a small multiplier has them
    stream = [uniform(noise_key(3, 1, "a"), p) for p in range(8001)]
    cells = Counter((int(10 * a), int(10 * b)) for a, b in itertools.pairwise(stream))
    assert chi_square([cells[a, b] for a in range(10) for b in range(10)], [0.01] * 100) < critical(99)


# --- the whole distribution ---


@pytest.mark.parametrize("vocabulary", [7, 256, 300, 512, 777], ids=lambda v: f"vocabulary-{v}")
def test_every_token_gets_its_share(vocabulary: int) -> None:
    # evenly spaced numbers must fall on each token within one of n·p times: far sharper than chance allows
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(vocabulary, generator=generator)
    count = 20_000
    counts = counts_of(draw(logits.tolist(), grid(count)), vocabulary)
    expected = count * logits.double().softmax(-1)
    assert (torch.tensor(counts) - expected).abs().max() <= 1.01


def test_tokens_come_in_order_of_their_ids() -> None:
    # the inverse distribution function: ¼, ½, ¼ cut [0, 1) at ¼ and ¾, and a cut belongs to the right
    logits = [math.log(1), math.log(2), math.log(1)]
    edges = torch.tensor([0.0, 0.2499999, 0.2500001, 0.7499999, 0.7500001, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, edges) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("vocabulary", [10, 300], ids=["small", "not-a-multiple-of-the-block"])
def test_frequencies_follow_the_softmax(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 0.5 * torch.randn(vocabulary, generator=generator)
    counts = counts_of(draw(logits.tolist(), numbers(30_000)), vocabulary)
    statistic = chi_square(counts, logits.double().softmax(-1).tolist())
    assert statistic < critical(vocabulary - 1)
    # negative control: another distribution is told apart
    other = (1.2 * logits).double().softmax(-1).tolist()
    assert chi_square(counts, other) > critical(vocabulary - 1)


def test_rows_are_sampled_each_by_itself() -> None:
    # one-hot rows: any mixing of rows, blocks or numbers shows
    tokens = [0, 255, 256, 511, 599]
    logits = torch.full((5, 600), -math.inf)
    logits[range(5), tokens] = 0.0
    uniforms = torch.tensor([0.0, 0.3, 0.5, 0.9, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, uniforms, temperature=1.0, top_p=1.0).tolist() == tokens


@pytest.mark.parametrize("top_p", [1.0, 0.6])
@pytest.mark.parametrize("number", [0.0, 1 - 2**-53], ids=["lowest", "highest"])
def test_extreme_numbers_give_tokens_of_positive_probability(number: float, top_p: float) -> None:
    # a first and a last block that are impossible throughout, and impossible tokens next to them; the rows' sums round
    # up in some and down in others, and the highest number must not run past the end in either
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 1000, generator=generator)
    logits[:, :300] = -math.inf
    logits[:, 700:] = -math.inf
    uniforms = torch.full((200,), number, dtype=torch.float64)
    tokens = sample(logits, uniforms, temperature=1.0, top_p=top_p)
    assert bool((logits.softmax(-1).gather(1, tokens[:, None]) > 0).all())
    if top_p == 1:  # and it is the first or the last possible token, but for those lost in rounding
        assert bool((tokens == 300).all() if number == 0 else (tokens > 690).all())


# --- top-p, temperature, greedy ---

HALVES = [math.log(p) for p in (1 / 8, 1 / 2, 1 / 8, 1 / 4)]  # likeliest first: tokens 1, 3, then 0 and 2 alike


@pytest.mark.parametrize(
    ("top_p", "shares"),
    [
        (0.3, [0, 1, 0, 0]),  # the likeliest alone reaches it
        (0.5, [0, 1, 0, 0]),  # reached exactly: no further token
        (0.51, [0, 2 / 3, 0, 1 / 3]),  # ½ and ¼, renormalised by ¾
        (0.75, [0, 2 / 3, 0, 1 / 3]),
        (0.999, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
        (1.0, [1 / 8, 1 / 2, 1 / 8, 1 / 4]),
    ],
)
def test_top_p_keeps_the_nucleus_and_renormalises(top_p: float, shares: list[float]) -> None:
    count = 2400
    counts = counts_of(draw(HALVES, grid(count), top_p=top_p), 4)
    assert counts == pytest.approx([count * share for share in shares], abs=1.01)
    assert [n > 0 for n in counts] == [share > 0 for share in shares]


def test_top_p_between_equal_tokens_keeps_one_of_them() -> None:
    # ½ + ¼ + ⅛ reach 0.8: the fourth token is as likely as the third, and yet outside
    counts = counts_of(draw(HALVES, grid(2800), top_p=0.8), 4)
    assert sorted(counts) == pytest.approx([0, 400, 800, 1600], abs=1.01)


@pytest.mark.parametrize("top_p", [1e-300, 1e-45, 1e-9])  # the first is 0 in fp32
def test_the_smallest_top_p_keeps_the_likeliest_token(top_p: float) -> None:
    assert set(draw([0.0, 2.0, 1.0], grid(100), top_p=top_p)) == {1}


def test_top_p_looks_across_blocks() -> None:
    # the two likeliest tokens of 600 lie in the first and in the last block
    logits = [0.0] * 600
    logits[3], logits[590] = math.log(600.0), math.log(1200.0)  # ¼ and ½ of 2398 in all, nearly
    counts = counts_of(draw(logits, grid(3000), top_p=0.6), 600)
    assert {token: n for token, n in enumerate(counts) if n} == {3: 1000, 590: 2000}


@pytest.mark.parametrize(
    ("temperature", "shares"),
    # p^(1/T), renormalised: ⅕, ⅘ at T = 1 become 1/17, 16/17 at T = ½ and ⅓, ⅔ at T = 2
    [(0.5, [1 / 17, 16 / 17]), (1.0, [1 / 5, 4 / 5]), (2.0, [1 / 3, 2 / 3])],
)
def test_temperature(temperature: float, shares: list[float]) -> None:
    counts = counts_of(draw([math.log(1), math.log(4)], grid(5100), temperature=temperature), 2)
    assert counts == pytest.approx([5100 * share for share in shares], abs=1.01)


def test_temperature_comes_before_the_nucleus() -> None:
    # at T = ½ the likeliest of ⅕, ⅘ holds 16/17 and reaches 0.9 alone; before the temperature it would not
    assert set(draw([math.log(1), math.log(4)], grid(100), temperature=0.5, top_p=0.9)) == {1}
    assert set(draw([math.log(1), math.log(4)], grid(100), temperature=1.0, top_p=0.9)) == {0, 1}


def test_greedy_takes_the_likeliest_whatever_the_number() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 300, generator=generator)
    likeliest = [max(range(300), key=row.__getitem__) for row in logits.tolist()]
    assert sample(logits, numbers(64), temperature=0, top_p=0.5).tolist() == likeliest
    for temperature in (2e-30, 1e-37, 1e-40, 1e-320):  # fp32 has no quotient for the last three
        for top_p in (1.0, 0.5):
            assert sample(logits, numbers(64), temperature=temperature, top_p=top_p).tolist() == likeliest


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_not_sampled_from(wrong: float, temperature: float) -> None:
    rows = torch.zeros(3, 300)
    rows[1, 7] = wrong
    if wrong < 0:  # one token may be impossible, but not all
        assert len(draw(rows[1].tolist(), grid(2), temperature=temperature)) == 2
        rows[1] = wrong
    with pytest.raises(QspinError, match=r"^the player's logits are not finite numbers: its training went too far"):
        sample(rows, grid(3), temperature=temperature, top_p=0.9)
