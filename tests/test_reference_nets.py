import pytest
import torch
from torch.nn import functional as F

from archscan.reference_nets import REFERENCE_NETS, CifarResNet, PaddedShortcut, lenet5

# Published, in millions: Han et al. 2015, LeNet-5 0.431; He et al. 2015, table 6: 0.27, 0.46, 0.66, 0.85 and 1.7; Huang
# et al. 2017, table 2: 1.0. The others have smaller classifiers than published: counted once, so that they stay so.
PARAMETERS = {
    "lenet5": 431_080,
    "resnet20_cifar": 269_722,
    "resnet32_cifar": 464_154,
    "resnet44_cifar": 658_586,
    "resnet56_cifar": 853_018,
    "resnet110_cifar": 1_727_962,
    "vgg16_bn_cifar": 14_724_042,
    "densenet40_cifar": 1_019_722,
    "mobilenetv2_cifar": 2_236_682,
}


@pytest.mark.parametrize("name", REFERENCE_NETS)
def test_network_has_its_published_size_and_classifies(name):
    net = REFERENCE_NETS[name]
    model = net.factory(num_classes=7).eval()
    assert model(torch.randn(2, *net.input_shape)).shape == (2, 7)
    assert sum(parameter.numel() for parameter in net.factory().parameters()) == PARAMETERS[name]
    assert len(net.mean) == len(net.std) == net.input_shape[0]
    assert net.source


def test_lenet5_takes_other_channels_and_sizes():
    assert lenet5(num_classes=3, in_channels=3, image_size=(32, 20))(torch.randn(1, 3, 32, 20)).shape == (1, 3)
    with pytest.raises(ValueError, match="16 x 16"):
        lenet5(image_size=(8, 8))


def test_residual_network_has_the_shared_keys_and_no_shortcut_parameters():
    keys = CifarResNet(20, 10).state_dict().keys()
    expected = {"conv1.weight", "linear.weight", "linear.bias"}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected |= {f"bn1.{entry}" for entry in norm}
    for block in (f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(3)):
        for k in (1, 2):
            expected |= {f"{block}.conv{k}.weight", *(f"{block}.bn{k}.{entry}" for entry in norm)}
    assert keys == expected


def test_padded_shortcut_is_option_a():
    x = torch.randn(2, 16, 8, 8)
    y = PaddedShortcut(16, 32, stride=2)(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_padded_shortcut_reads_its_attributes_when_it_runs():
    shortcut = PaddedShortcut(16, 32, stride=2)
    shortcut.pad_before, shortcut.pad_after, shortcut.stride = 1, 3, 4
    x = torch.randn(1, 5, 8, 8)
    assert torch.equal(shortcut(x), F.pad(x[:, :, ::4, ::4], (0, 0, 0, 0, 1, 3)))


def test_padded_shortcut_puts_an_odd_channel_last():
    assert PaddedShortcut(4, 7, stride=1)(torch.ones(1, 4, 1, 1)).flatten().tolist() == [0, 1, 1, 1, 1, 0, 0]
