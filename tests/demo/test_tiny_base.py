"""The tiny base of the demo and the tests."""

import math

import torch
from torch import nn

from vipolyqwen.demo.tiny_base import set_filter_bank

RATE = 16_000


def test_the_first_filters_of_the_speech_encoder_tell_tones_apart() -> None:
    convolution = nn.Conv1d(1, 32, kernel_size=400, bias=False)
    set_filter_bank(convolution, RATE)
    torch.testing.assert_close(convolution.weight.norm(dim=2), torch.ones(32, 1))
    loudest = []
    for hertz in (200, 1000, 4000):
        tone = torch.sin(2 * math.pi * hertz * torch.arange(RATE) / RATE)
        strength = convolution(tone[None, None])[0].square().mean(1)
        cosine, sine = strength[:16], strength[16:]
        assert cosine.argmax() == sine.argmax()  # a pair of filters has one frequency
        loudest.append(int(cosine.argmax()))
    assert loudest == sorted(set(loudest))  # higher tones, later filters
