"""Numbers that a file leaves to its seed are those that torch draws, as torch 2.12 printed them."""

import numpy as np
import pytest

from lora_jax.peft.kinds.generator import draw_normal, draw_uniform

# torch.randn(n, generator=torch.Generator().manual_seed(0)): n -> some of the numbers, by place.
NORMAL = {
    5: {0: 1.5409961, 1: -0.2934289, 2: -2.1787894, 3: 0.5684313, 4: -1.0845224},
    20: {0: -1.1258398, 3: -0.4338788, 4: 0.5988395, 15: -0.8436767, 19: 0.0537369},
}


@pytest.mark.parametrize("n", NORMAL)
def test_numbers_are_those_that_torch_printed(n):
    """An adapter of PEFT whose file has a seed in place of numbers would have others here."""
    drawn = draw_normal(0, (n,))
    for place, number in NORMAL[n].items():
        assert drawn[place] == pytest.approx(number, abs=1e-6)
    np.testing.assert_allclose(draw_uniform(0, (3,)), [0.4962566, 0.7682218, 0.0884774], atol=1e-7)
