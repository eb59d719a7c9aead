"Extraction equals the masked oracle, for every architecture and any mask."

import copy
import functools
import math
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from modnb.compat import import_torchvision
from modnb.extract import Anatomy, EmptyModule, extract, kept_weights, masked, without_rule
from modnb.models import create_model, list_models
from modnb.units import KINDS, NotTraceable, kind_of_sites, opaque, unit_axis, unit_sites

OURS = 16  # random masks for each of our models
TOLERANCE = 1e-4  # relative to the largest output, float32

# Families of torchvision at small inputs: depthwise, grouped, concatenating, squeeze-and-excitation, residual,
# shuffled, and with tokens. The second number is how many random masks each gets.
FAMILIES = {
    "alexnet": (64, 3), "vgg11_bn": (32, 2), "resnet18": (64, 8), "resnext50_32x4d": (64, 6), "densenet121": (64, 5),
    "googlenet": (64, 6), "inception_v3": (96, 5), "mobilenet_v2": (64, 8), "mobilenet_v3_small": (64, 8),
    "mnasnet0_5": (64, 8), "squeezenet1_1": (64, 8), "regnet_x_400mf": (64, 6), "regnet_y_400mf": (64, 6),
    "shufflenet_v2_x0_5": (64, 8), "efficientnet_b0": (64, 6), "convnext_tiny": (64, 4), "swin_t": (64, 4),
}
# timm's networks call functions where torchvision's have layers
TIMM = {"mobilenetv3_small_050": (64, 3), "efficientnet_lite0": (64, 3), "regnetx_002": (64, 3), "repvgg_a0": (64, 3)}


def unsettle(model: nn.Module) -> nn.Module:
    "Give normalisations statistics, scales and shifts as after training, and no layer zeros, so that a mistake shows"
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any(): layer.weight.data.normal_(generator=generator)
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low, high in [(layer.running_mean, -0.5, 0.5), (layer.running_var, 0.5, 2.0),
                                      (layer.weight.data, 0.5, 1.5), (layer.bias.data, -0.5, 0.5)]:
                tensor.copy_(torch.empty_like(tensor).uniform_(low, high, generator=generator))
    return model.eval()


@functools.cache
def anatomy_of(name: str, source: str) -> tuple[Anatomy, torch.Tensor]:
    torch.manual_seed(0)
    if source == "ours":
        model = create_model(name, width=0.125)
        size = model.config.get("image_size") or 32
    elif source == "timm":
        import_torchvision()  # timm imports it
        import timm

        model, size = timm.create_model(name, pretrained=False, num_classes=7), TIMM[name][0]
    else:
        options = dict(aux_logits=False, init_weights=False) if name in ("googlenet", "inception_v3") else {}
        model = getattr(import_torchvision().models, name)(weights=None, num_classes=7, **options)
        size = FAMILIES[name][0]
    x = torch.randn(2, 3, size, size)
    return Anatomy(unsettle(model), x), x


def random_masks(anatomy: Anatomy, kinds: list[str], share: float, seed: int) -> dict[str, torch.Tensor]:
    "Each unit stays with probability `share`; at least one stays at each site"
    generator, keep = torch.Generator().manual_seed(seed), {}
    for kind in kinds:
        for node in kind_of_sites(anatomy.traced, kind):
            units = node.meta["shape"][unit_axis(node)]
            mask = torch.rand(units, generator=generator) < share
            mask[torch.randint(units, (1,), generator=generator)] = True
            keep[node.meta["site"]] = mask
    return keep


def assert_equals_oracle(anatomy: Anatomy, keep: dict[str, torch.Tensor], x: torch.Tensor) -> None:
    try: smaller = anatomy.extract(keep)
    except EmptyModule: assume(False)  # two masks in a row with nothing in common
    with torch.no_grad(): expected, found = anatomy.masked(keep)(x), smaller(x)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


RANDOM = dict(deadline=None, suppress_health_check=list(HealthCheck))
KIND_SETS = st.sampled_from([["activation"], ["norm"], ["conv"], ["activation", "linear"], ["activation", "conv"]])
SHARES, SEEDS = st.sampled_from([0.3, 0.6, 0.9]), st.integers(0, 2**31)


@pytest.mark.parametrize("name", list_models())
def test_ours_equal_the_oracle(name):
    anatomy, x = anatomy_of(name, "ours")

    @settings(max_examples=OURS, **RANDOM)
    @given(KIND_SETS, SHARES, SEEDS)
    def check(kinds, share, seed): assert_equals_oracle(anatomy, random_masks(anatomy, kinds, share, seed), x)

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_equals_the_oracle(name):
    anatomy, x = anatomy_of(name, "torchvision")

    @settings(max_examples=FAMILIES[name][1], **RANDOM)
    @given(KIND_SETS, SHARES, SEEDS)
    def check(kinds, share, seed): assert_equals_oracle(anatomy, random_masks(anatomy, kinds, share, seed), x)

    check()


@pytest.mark.parametrize("name", TIMM)
def test_timm_equals_the_oracle_and_gets_narrower(name):
    anatomy, x = anatomy_of(name, "timm")

    @settings(max_examples=TIMM[name][1], **RANDOM)
    @given(SHARES, SEEDS)
    def check(share, seed): assert_equals_oracle(anatomy, random_masks(anatomy, ["activation"], share, seed), x)

    check()
    keep = random_masks(anatomy, ["activation"], 0.5, 0)
    smaller = anatomy.extract(keep)
    assert sum(p.numel() for p in smaller.parameters()) < 0.6 * sum(p.numel() for p in anatomy.model.parameters())


def test_enough_random_masks():
    assert OURS * len(list_models()) + sum(n for _, n in FAMILIES.values()) >= 200
    assert len(FAMILIES) >= 12


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "lenet5", "vgg12"])
def test_equals_masks_in_hooks(name):
    "A second oracle, which knows nothing of graphs: hooks that multiply the output of each ReLU"
    anatomy, x = anatomy_of(name, "ours")
    keep = random_masks(anatomy, ["activation"], 0.5, 3)
    hooks = [anatomy.model.get_submodule(site).register_forward_hook(
        lambda layer, args, out, m=mask: out * m.view(-1, *[1] * (out.dim() - 2))) for site, mask in keep.items()]
    with torch.no_grad(): expected = anatomy.model(x)
    for hook in hooks: hook.remove()
    assert torch.allclose(anatomy.extract(keep)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list_models())
def test_full_masks_change_nothing(name):
    anatomy, x = anatomy_of(name, "ours")
    keep = random_masks(anatomy, list(KINDS), 2.0, 0)
    whole = anatomy.extract(keep)
    shapes = {n: p.shape for n, p in anatomy.model.named_parameters()}
    assert {n: p.shape for n, p in whole.named_parameters()} == shapes
    with torch.no_grad(): assert torch.equal(whole(x), anatomy.model(x))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet"])
def test_the_model_is_left_alone(name):
    model = create_model(name, width=0.125)
    model.train()
    list(model.children())[0].eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    x = torch.randn(2, 3, 32, 32)
    keep = {site: torch.arange(units) < max(1, units // 2) for site, units in unit_sites(model, x).items()}
    smaller, oracle = extract(model, keep, x), masked(model, keep, x)
    with torch.no_grad():
        for p in smaller.parameters(): p.zero_()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    shared = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in oracle.parameters()} == shared
    assert not {p.data_ptr() for p in smaller.parameters()} & shared


def test_extracting_twice_equals_extracting_the_intersection():
    anatomy, x = anatomy_of("resnet18", "ours")
    first = random_masks(anatomy, ["activation"], 0.8, 5)
    once = anatomy.extract(first)
    second = {site: torch.arange(units) % 2 == 0 for site, units in unit_sites(once, x).items()}
    both = {}
    for site, mask in first.items():
        both[site] = mask.clone()
        both[site][mask] = second[site]
    with torch.no_grad(): expected, found = anatomy.masked(both)(x), extract(once, second, x)(x)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_kept_weights_count_the_parameters():
    for name in ["vgg16_4096", "resnet18", "mobilenet", "rescnn"]:
        anatomy, _ = anatomy_of(name, "ours")
        keep = random_masks(anatomy, ["activation"], 0.6, 9)
        counts = {n: w.count() for n, w in anatomy.kept_weights(keep, outputs=[1, 4]).items()}
        assert counts == {n: p.numel() for n, p in anatomy.extract(keep, outputs=[1, 4]).named_parameters()}


def test_grouped_convolutions_only_add_zeros():
    "Groups of different sizes are filled up; the fillers are zero weights and not counted as kept"
    anatomy, _ = anatomy_of("resnext50_32x4d", "torchvision")
    keep = random_masks(anatomy, ["activation"], 0.5, 2)
    with torch.no_grad():
        for p in anatomy.model.parameters(): p[p == 0] = 1e-3  # initialisation may draw a zero
    smaller = anatomy.extract(keep)
    for name, weights in anatomy.kept_weights(keep).items():
        parameter = smaller.get_parameter(name)
        assert weights.count() == int((parameter != 0).sum()) or parameter.dim() == 1


# --------------------------------------------------------------------------------------------------------------------
# Small networks, each with one thing that is easy to get wrong


class Block(nn.Module):
    "Two convolutions around whatever `between` does"

    def __init__(self, between, width=8, after=None):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.between, self.extra = between, nn.Conv2d(width, width, 1)
        self.last = nn.Conv2d(after or width, 5, 1)

    def forward(self, x): return self.last(self.between(self, F.relu(self.norm(self.first(x))))).mean((2, 3))


class Squeeze(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x):
        b, c = x.shape[0], x.shape[1]
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1).view(b, c)))))
        return x * gate.view(b, c, 1, 1)


class Scaled(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(width, 1, 1)), nn.Parameter(torch.randn(1, width, 1, 1))

    def forward(self, x): return x * self.scale + F.relu(x * self.scale + self.shift)


class Functions(nn.Module):
    "Normalisation as timm writes it: a subclass of `nn.BatchNorm2d` whose own forward calls the function"

    class Norm(nn.BatchNorm2d):
        def forward(self, x):
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, 1e-5)
            return F.relu(x)

    Norm.__module__ = "elsewhere"  # a subclass that torch.fx looks into

    def __init__(self, width=8):
        super().__init__()
        self.norm = self.Norm(width)

    def forward(self, x): return self.norm(x)


class Tokens(nn.Module):
    "Attention as torch has it, with an MLP narrowed in the last dimension"

    def __init__(self, width=8):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens = tokens + self.down(F.gelu(self.up(self.norm(tokens))))
        return tokens.transpose(1, 2).reshape(x.shape[0], 8, x.shape[2], x.shape[3])


class Same(nn.Conv2d):
    "Padding that depends on the size of the map, as in networks that come from TensorFlow"

    def forward(self, x):
        missing = max((math.ceil(x.shape[-1] / self.stride[0]) - 1) * self.stride[0] + 3 - x.shape[-1], 0)
        if missing > 0: x = F.pad(x, [missing // 2, missing - missing // 2] * 2)
        return F.conv2d(x, self.weight, self.bias, self.stride)


class Standard(nn.Conv2d):
    "A convolution with weights standardised by `F.batch_norm`, and a scale of its own"

    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.rand(8, 1, 1, 1) + 0.5)

    def forward(self, x):
        scale = (self.gain * 0.3).view(-1)
        weight = F.batch_norm(self.weight.reshape(1, 8, -1), None, None, weight=scale, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


class ScaledNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.gain = nn.BatchNorm2d(8), nn.Parameter(torch.rand(8, 1))

    def forward(self, x):
        return F.batch_norm(x, self.norm.running_mean, self.norm.running_var, (self.gain * 2).view(-1))


class Last(nn.Module):
    "Channels in the last dimension, cut into two, with embeddings added that are the same for all images"

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(6, 8)
        self.places = nn.Parameter(torch.randn(1, 6, 6, 6))

    def forward(self, x):
        a, b = self.up(self.norm(x.permute(0, 2, 3, 1))).chunk(2, -1)
        return self.down((F.gelu(a) + self.places) * b).permute(0, 3, 1, 2)


class Attention(nn.Module):
    "Four heads of two channels; with a bias by relative position also a second, unused way to compute"

    def __init__(self, width=8, heads=4, bias=False):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.table = nn.LayerNorm(2), nn.Parameter(torch.randn(71, heads)) if bias else None
        self.register_buffer("where", torch.arange(36)[:, None] - torch.arange(36) + 35)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        b, n, c = tokens.shape
        q, k, v = self.qkv(tokens).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.table is None: mixed = F.scaled_dot_product_attention(self.q_norm(q), k, v)
        else:
            scores = self.q_norm(q) @ k.transpose(-2, -1) + self.table[self.where].permute(2, 0, 1).unsqueeze(0)
            mixed = scores.softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c)).transpose(1, 2).reshape(b, c, x.shape[2], x.shape[3])


def shuffle(x, groups=2):
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def in_place(net, x):
    y = net.extra(x)
    z = F.relu(y, inplace=True)
    return z + y  # y has been overwritten: this is 2z


def in_place_sum(net, x):
    y = net.extra(x)
    y += x
    return torch.relu_(y)


def same_layer_twice(net, x): return net.extra(F.relu(net.extra(x)))


def halves(net, x):
    a, b = net.extra(x).chunk(2, dim=1)
    return torch.cat([F.relu(a), torch.sigmoid(b) * a], 1)


def windows(net, x):
    y = F.relu(net.extra(x))
    return torch.cat([y[:, 2:6], x[:, :4]], dim=1)


def filled(net, x):
    y = torch.zeros_like(x)
    y[:, :4] = F.relu(net.extra(x))[:, 4:]
    return x + y


def cleared(net, x):
    y = net.extra(x).clone()
    y[:, :2].zero_()
    y[:, 2] += 1
    return F.relu(y)


TRICKY = {
    "filled in parts": Block(filled), "cleared in parts": Block(cleared),
    "in place": Block(in_place), "in-place sum": Block(in_place_sum), "same layer twice": Block(same_layer_twice),
    "chunks": Block(halves), "slices": Block(windows), "shuffle": Block(lambda net, x: F.relu(net.extra(shuffle(x)))),
    "difference": Block(lambda net, x: F.relu(net.extra(x)) - x),
    "difference, turned": Block(lambda net, x: x - F.relu(net.extra(x))),
    "product of maps": Block(lambda net, x: F.relu(net.extra(x)) * x),
    "spatial gate": Block(lambda net, x: x * torch.sigmoid(net.extra(x).mean(1, keepdim=True))),
    "plus a number": Block(lambda net, x: F.relu(net.extra(x + 1) * 0.5 - 2) / 3),
    "broadcast sum": Block(lambda net, x: x + F.relu(net.extra(x)).mean((2, 3), keepdim=True)),
    "concatenated twice": Block(lambda net, x: torch.cat([x, x, F.relu(net.extra(x))], 1), after=24),
    "joined in space": Block(lambda net, x: torch.cat([x, F.relu(net.extra(x))], 2)),
    "padded": Block(lambda net, x: F.relu(net.extra(F.pad(x, (1, 1, 1, 1), value=0.3)))),
    "upsampled": Block(lambda net, x: F.relu(net.extra(F.interpolate(x, scale_factor=2)))),
    "softmax over channels": Block(lambda net, x: F.relu(net.extra(x.softmax(1)))),
    "permuted": Block(lambda net, x: F.relu(net.extra(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
    "size of a dead end": Block(lambda net, x: F.relu(net.extra(x)).reshape(net.extra(x).size(0), 8, -1, 1)),
}
LAYERS = {
    "group norm": nn.GroupNorm(2, 8), "instance norm": nn.InstanceNorm2d(8, affine=True), "prelu": nn.PReLU(8),
    "prelu, one slope": nn.PReLU(), "transposed": nn.ConvTranspose2d(8, 8, 2, stride=2),
    "grouped": nn.Conv2d(8, 8, 3, padding=1, groups=2), "multiplier": nn.Conv2d(8, 8, 3, groups=4, bias=False),
    "depthwise": nn.Conv2d(8, 8, 3, groups=8), "squeeze and excitation": Squeeze(), "scale and shift": Scaled(),
    "tokens": Tokens(), "same padding": Same(8, 8, 3, stride=2), "standardised": Standard(8, 8, 3),
    "channels last": Last(),
    "attention": Attention(), "attention with positions": Attention(bias=True), "torch's attention": Tokens(),
    "computed scale": ScaledNorm(), "dropout": nn.Dropout(), "shuffled pixels": nn.PixelShuffle(1),
    "functions": Functions(), "weight norm": nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
}
NETS = TRICKY | {name: Block(None) for name in LAYERS}
for name, layer in LAYERS.items():
    NETS[name].layer = layer
    NETS[name].between = lambda net, x: F.relu(net.extra(net.layer(x)))
CATALOGUE = {name: Anatomy(unsettle(net), torch.zeros(2, 3, 6, 6)) for name, net in NETS.items()}


@pytest.mark.parametrize("name", NETS)
def test_tricky_networks_equal_the_oracle(name):
    anatomy, x = CATALOGUE[name], torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))

    @settings(max_examples=10, **RANDOM)
    @given(st.sampled_from([["activation"], ["norm"], ["conv", "head"], ["activation", "conv", "linear"]]),
           SHARES, SEEDS)
    def check(kinds, share, seed): assert_equals_oracle(anatomy, random_masks(anatomy, kinds, share, seed), x)

    check()


@pytest.mark.parametrize("name", ["chunks", "slices", "concatenated twice", "squeeze and excitation", "scale and shift",
                                  "depthwise", "difference", "permuted", "spatial gate", "functions", "same padding",
                                  "standardised", "computed scale", "channels last", "attention"])
def test_known_operations_get_narrower(name):
    "Not everything may fall back to being kept whole"
    anatomy = CATALOGUE[name]
    smaller = anatomy.extract({"relu": torch.arange(8) < 2})
    assert smaller.first.out_channels == 2
    if name == "scale and shift": return  # reads a parameter twice, and so holds it twice
    counts = [w.count() for w in anatomy.kept_weights({"relu": torch.arange(8) < 2}).values()]
    assert sum(counts) == sum(p.numel() for p in smaller.parameters())


@pytest.mark.parametrize("name", NETS)
def test_any_number_of_images(name):
    anatomy, x = CATALOGUE[name], torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): assert torch.allclose(anatomy.extract({})(x), anatomy.model(x), atol=1e-5)


@pytest.mark.parametrize("name", ["attention", "attention with positions", "torch's attention"])
def test_heads_are_units(name):
    anatomy = CATALOGUE[name]
    site, = (n for n in kind_of_sites(anatomy.traced, "head"))
    heads = site.meta["shape"][unit_axis(site)]
    keep = {site.meta["site"]: torch.arange(heads) == 1}
    left = {n: w.count() for n, w in anatomy.kept_weights(keep).items()}
    whole = {n: w.count() for n, w in anatomy.kept_weights({}).items()}
    for path, count in left.items():
        inner = any(part in path for part in ("qkv", "in_proj", "proj.weight"))
        assert count * heads == whole[path] if inner else count == whole[path], path
    assert sum(left.values()) == sum(p.numel() for p in anatomy.extract(keep).parameters())


@pytest.mark.parametrize("version", ["", "V2"])
def test_heads_of_torchvisions_windows_are_units(version):
    "Shifted windows, which torchvision hides in one call of a function"
    import_torchvision()
    from torchvision.models import swin_transformer as swin

    parts = {} if not version else {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    torch.manual_seed(0)
    net = swin.SwinTransformer([2, 2], 8, [2, 2], [2, 4], [4, 4], num_classes=5, **parts).eval()
    for parameter in net.parameters(): nn.init.normal_(parameter, 0.5, 0.3)
    x = torch.randn(3, 3, 20, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        anatomy = Anatomy(net, x[:2])
    with torch.no_grad(): torch.testing.assert_close(anatomy.extract({})(x), net(x), rtol=1e-4, atol=1e-4)
    heads = kind_of_sites(anatomy.traced, "head")
    assert [n.meta["shape"][unit_axis(n)] for n in heads] == [2, 2, 4, 4]
    for seed in range(3): assert_equals_oracle(anatomy, random_masks(anatomy, ["activation", "head"], 0.5, seed), x)
    one = {n.meta["site"]: torch.arange(n.meta["shape"][unit_axis(n)]) == 1 for n in heads}
    smaller = anatomy.extract(one)
    assert smaller.get_parameter("features.1.0.attn.qkv.weight").shape == (12, 8)
    assert smaller.get_parameter("features.3.1.attn.proj.weight").shape == (16, 4)
    larger = torch.randn(1, 3, 40, 40)
    for network in (smaller, copy.deepcopy(smaller)):
        with pytest.raises(ValueError, match="for images of 20 x 20 pixels, not 40 x 40"): network(larger)


def test_a_layer_called_several_times_is_there_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 2, 1)
            self.tied = nn.Conv2d(6, 6, 3, padding=1)
            self.tied.weight = self.shared.weight

        def forward(self, x):
            x = F.relu(self.first(x))
            for _ in range(4): x = F.relu(self.shared(x))
            return self.head(F.relu(self.tied(x)))

    net, x = Shared(), torch.randn(2, 3, 5, 5)
    anatomy = Anatomy(net, x)
    size = lambda module: sum(p.numel() for p in module.parameters())
    assert size(anatomy.extract({})) == size(net)
    sites = list(unit_sites(net, x))
    same = {site: torch.arange(6) < 3 for site in sites}
    different = {site: torch.arange(6) != i for i, site in enumerate(sites)}
    for keep, largest in ((same, size(net) // 2), (different, size(net))):
        smaller = anatomy.extract(keep)
        with torch.no_grad(): assert torch.allclose(smaller(x), anatomy.masked(keep)(x), atol=1e-5)
        assert size(smaller) <= largest and not [n for n, _ in smaller.named_parameters() if "_call" in n]
        assert sum(w.count() for w in anatomy.kept_weights(keep).values()) >= size(smaller)
    smaller = anatomy.extract(same)
    assert smaller.tied.weight is smaller.shared.weight


def test_optional_arguments_keep_their_default():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x, mask=None, *, scale=1):
            x = F.relu(self.a(x)) * scale
            return self.b(x if mask is None else x * mask)

    net, x, keep = Optional(), torch.randn(2, 3, 4, 4), {"relu": torch.tensor([True, False, True, False])}
    with torch.no_grad(): assert torch.allclose(extract(net, keep, x)(x), masked(net, keep, x)(x), atol=1e-6)


def test_wrapped_networks_are_unwrapped():
    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.zeros(1, 3, 2, 2)
    for wrapped in (nn.DataParallel(net), torch.compile(net, backend="eager"), nn.DataParallel(torch.compile(net))):
        assert unit_sites(wrapped, x) == {"1": 4} and extract(wrapped, {}, x)(x).shape == (1, 2, 2, 2)
    with pytest.raises(ValueError, match="TorchScript.*give the nn.Module"): unit_sites(torch.jit.trace(net, x), x)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_other_numbers_than_float32(dtype):
    net, x = Block(lambda net, x: F.relu(net.extra(x))).eval().to(dtype), torch.randn(2, 3, 6, 6)
    smaller = extract(net, {"relu": torch.arange(8) < 4}, x)
    assert {p.dtype for p in smaller.parameters()} == {dtype} and smaller(x.to(dtype)).dtype == dtype


def test_several_outputs_and_a_dictionary():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = F.relu(self.a(x))
            return {"features": x, "scores": self.b(x)}

    x, net, keep = torch.randn(2, 3, 4, 4), Two(), {"relu": torch.tensor([True, False, True, False])}
    found, expected = extract(net, keep, x)(x), masked(net, keep, x)(x)
    assert found["features"].shape == (2, 4, 4, 4) and (found["features"][:, 1] == 0).all()
    assert all(torch.allclose(found[k], expected[k], atol=1e-6) for k in expected)
    with pytest.raises(ValueError, match="one tensor"): extract(net, keep, x, outputs=[0])


@dataclass
class Answer:
    loss: torch.Tensor | None
    logits: torch.Tensor


@pytest.mark.parametrize("answer", [lambda x, y: {"hidden": x, "logits": y}, lambda x, y: (y,), lambda x, y: (y, None),
                                    lambda x, y: Answer(None, y)])
def test_columns_of_logits_among_other_outputs(answer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 5)

        def forward(self, x):
            x = F.relu(self.a(x))
            return answer(x, self.b(x))

    net, x, keep = Net(), torch.randn(2, 3), {"relu": torch.tensor([True, False, True, True])}
    whole = Net.forward(net, x)
    with torch.no_grad(): found = extract(net, {}, x, outputs=[1, 3])(x)
    logits = whole.logits if isinstance(whole, Answer) else whole["logits"] if isinstance(whole, dict) else whole[0]
    assert torch.allclose(found, logits[:, [1, 3]], atol=1e-6)
    assert extract(net, keep, x, outputs=[1, 3])(x).shape == (2, 2)


def test_an_output_with_dead_channels_keeps_its_width():
    anatomy, x = anatomy_of("squeezenet1_1", "torchvision")
    keep = {"classifier.2": torch.arange(7) < 3}  # the ReLU on the outputs
    with torch.no_grad(): found = anatomy.extract(keep)(x)
    assert found.shape == (2, 7) and (found[:, 3:] == 0).all()
    assert anatomy.extract({}, outputs=[1, 5])(x).shape == (2, 2)


def test_fine_tuning_an_extracted_network():
    anatomy, x = anatomy_of("resnet18", "ours")
    smaller = anatomy.extract(random_masks(anatomy, ["activation"], 0.5, 0)).train()
    smaller(x).sum().backward()
    assert all(p.grad is not None for p in smaller.parameters())


class Dropped(nn.Module):
    def __init__(self, always=False):
        super().__init__()
        self.first, self.last, self.always = nn.Linear(4, 64), nn.Linear(64, 3), always

    def forward(self, x): return self.last(F.dropout(F.relu(self.first(x)), 0.5, self.training or self.always))


@pytest.mark.parametrize("twice", [False, True])
def test_dropout_by_a_function_lives_where_the_network_trains(twice):
    net, x, keep = Dropped(), torch.randn(5, 4), {"relu": torch.arange(64) < 40}
    assert extract(net.train(), keep, x).get_submodule("dropout_in_training").training
    smaller = copy.deepcopy(extract(net.eval(), keep, x))
    if twice: smaller = extract(smaller, {"relu": torch.arange(40) < 40}, x)
    assert torch.equal(smaller(x), smaller(x)) and smaller(x).equal(extract(net, keep, x)(x))
    torch.testing.assert_close(smaller(x), masked(net, keep, x)(x))
    smaller.train()
    assert not torch.equal(smaller(x), smaller(x))
    seen = smaller.get_submodule("dropout_in_training")(torch.ones(1000))
    assert 400 < (seen == 0).sum() < 600 and set(seen.tolist()) == {0.0, 2.0}
    always = extract(Dropped(always=True).eval(), keep, x)
    assert not torch.equal(always(x), always(x)), "what never stops does not stop here"


def test_moves_and_copies_like_any_module():
    anatomy, x = anatomy_of("resnet18", "ours")
    smaller = anatomy.extract(random_masks(anatomy, ["activation"], 0.5, 0))
    again = copy.deepcopy(smaller).double()
    assert torch.allclose(again(x.double()).float(), smaller(x), rtol=1e-3, atol=1e-4)
    assert not [n for n in smaller.state_dict() if n.startswith("channels_")]


# --------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.fixture
def lenet(): return create_model("lenet5", num_classes=6), torch.zeros(1, 3, 32, 32)


def first_site(model, x): return next(iter(unit_sites(model, x).items()))


def test_wrong_width_names_the_site(lenet):
    site, units = first_site(*lenet)
    with pytest.raises(ValueError, match=f"'{site}' has {units + 1} entries, but the site has {units} units"):
        extract(lenet[0], {site: torch.ones(units + 1, dtype=torch.bool)}, lenet[1])


def test_empty_mask_names_the_site(lenet):
    site, units = first_site(*lenet)
    with pytest.raises(EmptyModule, match=f"'{site}' keeps none of its {units}"):
        extract(lenet[0], {site: torch.zeros(units, dtype=torch.bool)}, lenet[1])


def test_masks_without_common_units_name_the_later_site():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    keep = {"1": torch.tensor([True, False, False, False]), "3": torch.tensor([False, True, True, True])}
    with pytest.raises(EmptyModule, match="'3'"): extract(net, keep, torch.zeros(1, 3, 2, 2))


def test_masks_of_another_model(lenet):
    with pytest.raises(ValueError, match="no site 'features.99'"):
        extract(lenet[0], {"features.99": torch.ones(3, dtype=torch.bool)}, lenet[1])


class Branching(nn.Module):
    def forward(self, x): return x * 2 if x.mean() > 0 else x


def test_untraceable_layer_is_kept_whole_and_named_once():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), Branching()), nn.Conv2d(4, 2, 1), Branching())
    x, keep = torch.randn(1, 3, 2, 2), {"1.0": torch.tensor([True, False, True, False])}
    with pytest.warns(UserWarning, match=r"kept whole.*'1\.1', '3' \(Branching\).*content of a tensor") as told:
        anatomy = Anatomy(net, x)
    assert len(told) == 1
    with torch.no_grad(): assert torch.allclose(anatomy.extract(keep)(x), anatomy.masked(keep)(x), atol=1e-6)
    assert anatomy.extract(keep).get_submodule("0").out_channels == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with opaque(Branching): assert without_rule(net, x) == {"1.1": "Branching", "3": "Branching"}
    with pytest.warns(UserWarning): Anatomy(net, x) # the block has ended
    with pytest.raises(NotTraceable, match="Nothing is left"): Anatomy(nn.Sequential(Branching()), x)


def test_an_example_that_does_not_fit_is_not_blamed_on_a_layer():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(5, 4, 1)

        def forward(self, x): return self.conv(x) if x.shape[2] > 1 else x

    with pytest.raises(ValueError, match="does not pass node '1.conv'"):
        extract(nn.Sequential(nn.Conv2d(3, 4, 1), Inner()), {}, torch.zeros(1, 3, 2, 2))


def test_assignment_into_a_tensor_is_named():
    class Assigns(nn.Module):
        def forward(self, x):
            x[:, 0] = 0
            return x

    with pytest.raises(NotTraceable, match="Assigns"): extract(nn.Sequential(Assigns()), {}, torch.zeros(1, 3, 2, 2))


def test_a_part_overwritten_through_a_view_is_named():
    "`y` is read afterwards, but no line says that it has changed"
    def through_a_view(net, x):
        y = net.extra(x)
        y[:, 0].zero_()
        return F.relu(y)

    with pytest.raises(NotTraceable, match="'zero_' overwrites a part of 'extra', which is read later"):
        extract(Block(through_a_view).eval(), {}, torch.zeros(1, 3, 6, 6))


def test_example_of_the_wrong_shape_names_the_node(lenet):
    with pytest.raises(ValueError, match="does not pass node"): extract(lenet[0], {}, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="must be a tensor"): extract(lenet[0], {}, (1, 3, 32, 32))


def test_outputs_that_do_not_exist(lenet):
    with pytest.raises(ValueError, match=r"\[6\] do not exist; the network has 6"):
        kept_weights(lenet[0], {}, lenet[1], outputs=[0, 6])
    with pytest.raises(EmptyModule, match="no column"): extract(lenet[0], {}, lenet[1], outputs=[])


def test_operations_without_a_rule():
    "None in a plain network; shuffling channels and mixing positions have none"
    import_torchvision()
    from torchvision import models

    images = torch.zeros(1, 3, 64, 64)
    for name in ("resnet18", "mobilenet_v3_small", "squeezenet1_1"):
        assert without_rule(models.get_model(name, num_classes=3), images) == {}, name

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Linear(4, 2)

        def forward(self, x):
            a, b = self.norm(self.conv(x)).chunk(2, 1)
            return self.head(torch.cat([a, b], 1).softmax(1).mean((2, 3)))

    assert without_rule(Mixing(), images) == {"norm": "GroupNorm", "softmax": "softmax"}
