"""Filter encoders against direct calls of transformers: its image processors, its models, and arithmetic by hand."""

import json
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_unlearn import FASTConfig, FASTFitter, FASTSafetyChecker, FilterEncoder
from hf_unlearn.filtering.encoding.preprocessing import ImagePreprocessing


# Another batch, or other memory: two layers' sums of 32 products of at most 10, √32 · 10 · 6e-8 = 3e-6, × 3.
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
VISION = SMALL | {"num_hidden_layers": 2, "image_size": 28, "patch_size": 14, "initializer_range": 0.2}
CLIP_TEXT = SMALL | {"num_hidden_layers": 1, "vocab_size": 50, "eos_token_id": 2, "bos_token_id": 1}
SQUARE = {"height": 28, "width": 28}
PROCESSORS = {
    "vit": ViTImageProcessorPil(size=SQUARE),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE),
    "siglip": SiglipImageProcessorPil(size=SQUARE),
    "resnet": ConvNextImageProcessorPil(size={"shortest_edge": 28}, crop_pct=0.875, resample=2),
    "large convnext": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "nearest": ViTImageProcessorPil(size={"height": 16, "width": 32}, resample=0),
    "not square": ViTImageProcessorPil(size={"height": 20, "width": 35}),
    "no resize": CLIPImageProcessorPil(do_resize=False, crop_size=SQUARE),
    "odd crop": CLIPImageProcessorPil(size={"shortest_edge": 31}, crop_size={"height": 28, "width": 41}),
    "no normalize": ViTImageProcessorPil(size=SQUARE, do_normalize=False),
    "no rescale": ViTImageProcessorPil(size=SQUARE, do_rescale=False, do_normalize=False),
    "other rescale": ViTImageProcessorPil(size=SQUARE, rescale_factor=1 / 127.5, do_normalize=False),
}

OLD_PIL = int(PIL.__version__.partition(".")[0]) < 13


def build(model_class, config):
    """In eval mode, always the same; statistics and norms too are other than where they start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config).eval()
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif name.endswith("running_mean") or ("norm" in name and name.endswith("bias")):
                tensor.normal_()
    return model


def noise(width, height, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def as_tensor(image):
    """`[1, c, h, w]` in [-1, 1], of a grey or RGB image."""
    array = torch.from_numpy(np.array(image, dtype=np.float32))
    return ((array[None] if array.ndim == 2 else array.permute(2, 0, 1)) / 127.5 - 1)[None]


IMAGES = [noise(40, 30), noise(28, 28, seed=1), noise(17, 90, seed=2), noise(200, 160, seed=3)]
# fmt: off
FAMILIES = {  # model class, config, and what makes an embedding of pixels
    "clip": (transformers.CLIPModel,
             lambda: transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=12),
             lambda model, pixels: model.get_image_features(pixels).pooler_output),
    "clip vision": (transformers.CLIPVisionModelWithProjection,
                    lambda: transformers.CLIPVisionConfig(**VISION, projection_dim=12),
                    lambda model, pixels: model(pixels).image_embeds),
    "clip without projection": (transformers.CLIPVisionModel, lambda: transformers.CLIPVisionConfig(**VISION),
                                lambda model, pixels: model(pixels).pooler_output),
    "siglip": (transformers.SiglipModel,
               lambda: transformers.SiglipConfig(text_config=CLIP_TEXT | {"projection_size": 16}, vision_config=VISION),
               lambda model, pixels: model.get_image_features(pixels).pooler_output),
    "vit": (transformers.ViTForImageClassification, lambda: transformers.ViTConfig(**VISION),
            lambda model, pixels: model.vit(pixels).last_hidden_state[:, 0]),
    "dinov2": (transformers.Dinov2Model, lambda: transformers.Dinov2Config(**VISION),
               lambda model, pixels: model(pixels).pooler_output),
    "resnet": (transformers.ResNetForImageClassification,
               lambda: transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
               lambda model, pixels: model.resnet(pixels).pooler_output[:, :, 0, 0]),
}
# fmt: on
STOCK_PROCESSOR = {"clip vision": "clip", "clip without projection": "clip"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with model and processor for each family, written once."""
    folders = {}
    for family, (model_class, config, _) in FAMILIES.items():
        folders[family] = tmp_path_factory.mktemp("secret-place") / family.replace(" ", "-")
        build(model_class, config()).save_pretrained(folders[family])
        PROCESSORS[STOCK_PROCESSOR.get(family, family)].save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="module")
def sentences(tmp_path_factory, tokenizer):
    sizes = SMALL | {"num_hidden_layers": 2, "max_position_embeddings": 24, "initializer_range": 0.2}
    config = transformers.BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    folder = tmp_path_factory.mktemp("secret-place") / "bert"
    build(transformers.BertForSequenceClassification, config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def copied(folder, to):
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())


@pytest.fixture
def resnet(checkpoints):
    return FilterEncoder.from_pretrained(checkpoints["resnet"])


class TestPreprocessing:
    @pytest.mark.parametrize("name", PROCESSORS)
    def test_as_the_stock_processor(self, name):
        processor = PROCESSORS[name]
        preprocessing = ImagePreprocessing.of(processor)
        assert ImagePreprocessing(**json.loads(json.dumps(vars(preprocessing)))) == preprocessing
        for size in ((40, 30), (28, 28), (17, 90), (300, 20), (1, 1), (1, 50), (50, 1), (5, 3)):
            image = noise(*size)
            ours, stock = preprocessing.prepare([image]), processor(image, return_tensors="pt")["pixel_values"]
            assert ours.shape == stock.shape
            error = (ours - stock) * torch.tensor(preprocessing.std).reshape(-1, 1, 1) * 255
            # PIL rounds twice to a whole number; before 13 it is further off where one side grows and the other shrinks.
            assert error.abs().max() < (8 if OLD_PIL and size == (17, 90) else 1.2)
            assert error.abs().mean() < 0.4

    def test_grey_encoder(self):
        processor = ViTImageProcessorPil(size=SQUARE, image_mean=[0.5], image_std=[0.5])
        preprocessing = ImagePreprocessing.of(processor, transformers.ViTConfig(num_channels=1))
        assert preprocessing.channels == 1
        for image in (noise(40, 30), noise(40, 30, "L")):
            stock = processor(image.convert("L"), return_tensors="pt")["pixel_values"]
            ours = preprocessing.prepare([image])
            assert ours.shape == stock.shape
            assert (ours - stock).abs().max() < 3 / 127.5  # the grey of RGB is rounded there, too
            torch.testing.assert_close(preprocessing.prepare(as_tensor(image)), ours)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV"])
    def test_every_mode_as_the_stock_processor(self, mode):
        image, processor = noise(40, 30), PROCESSORS["clip"]
        if mode in ("LA", "La", "PA", "RGBA", "RGBa"):
            image.putalpha(noise(40, 30, "L", seed=1))
        image = image.convert("RGBA").convert("LA").convert(mode) if mode in ("La", "PA") else image.convert(mode)
        ours = ImagePreprocessing.of(processor).prepare([image])
        known = image.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode))
        assert (ours - processor(known, return_tensors="pt")["pixel_values"]).abs().max() < 0.02

    def test_what_is_transparent_is_white(self):
        paletted = Image.new("P", (8, 8), 3)
        paletted.info["transparency"] = 3
        for image in (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.new("LA", (8, 8), (0, 0)), paletted):
            assert (ImagePreprocessing().prepare([image]) == 1).all()

    def test_more_than_eight_bits(self):
        ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
        wanted = torch.from_numpy(ramp.astype(np.float32) / 32767.5 - 1).expand(1, 3, 8, 8)
        eight = (ramp // 257).astype(np.float32)
        images = [Image.fromarray(ramp), Image.fromarray(eight), Image.fromarray(eight.astype(np.int32))]
        assert [image.mode for image in images] == ["I;16", "F", "I"]
        for image, tolerance in zip(images, (1e-6, 0.01, 0.01), strict=True):
            torch.testing.assert_close(ImagePreprocessing().prepare([image]), wanted, atol=tolerance, rtol=0)

    def test_crop_keeps_the_centre_and_pads_with_black(self):
        preprocessing = ImagePreprocessing(channels=1, crop=(2, 3), mean=(0.0,), std=(1.0,))
        pixels = (torch.arange(16.0).reshape(1, 1, 4, 4) / 15) * 2 - 1
        wanted = torch.tensor([[4, 5, 6], [8, 9, 10]]) / 15
        torch.testing.assert_close(preprocessing.prepare(pixels)[0, 0], wanted)
        wanted = torch.tensor([[0, 0.5, 0], [0, 0, 0]])  # the odd line is below, the odd column on the right
        assert torch.equal(preprocessing.prepare(torch.zeros(1, 1, 1, 1))[0, 0].flip(0), wanted)

    def test_long_images_lose_only_their_ends(self):
        preprocessing = ImagePreprocessing.of(PROCESSORS["clip"])
        image = noise(5000, 1)
        ours, whole = preprocessing.prepare([image]), preprocessing.prepare([image.crop((2000, 0, 3000, 1))])
        torch.testing.assert_close(ours, whole)
        upright = preprocessing.prepare([image.rotate(90, expand=True)])
        torch.testing.assert_close(upright, ours.rot90(1, (2, 3)), atol=1e-4, rtol=1e-4)

    def test_tensor_and_image_are_the_same(self):
        for name in ("clip", "vit", "resnet", "nearest"):
            preprocessing = ImagePreprocessing.of(PROCESSORS[name])
            for image in (*IMAGES, noise(40, 30, "L")):
                torch.testing.assert_close(preprocessing.prepare(as_tensor(image)), preprocessing.prepare([image]))

    def test_small_overshoot_is_the_border(self):
        preprocessing = ImagePreprocessing()
        images = torch.rand(2, 3, 8, 8) * 2 - 1
        images[:, :, ::2] = 1
        over = torch.where(images == 1, 1.01, images)
        assert torch.equal(preprocessing.prepare(over), preprocessing.prepare(images))

    @pytest.mark.parametrize(
        ("kind", "settings"),
        [
            (EfficientNetImageProcessorPil, {"size": SQUARE, "rescale_offset": True, "include_top": True}),
            (ViTImageProcessorPil, {"size": {"shortest_edge": 28, "longest_edge": 40}}),
            (ViTImageProcessorPil, {"size": {"shortest_edge": 28}}),
            (ViTImageProcessorPil, {"size": SQUARE, "resample": 1}),
            (CLIPImageProcessorPil, {"size": SQUARE, "crop_size": SQUARE, "do_pad": True, "pad_size": {"height": 40, "width": 40}}),
        ],
    )  # fmt: skip
    def test_unknown_steps_are_refused(self, kind, settings):
        with pytest.raises(ValueError, match=r"^(preprocessing|crop|resample): [^\n]+$"):
            ImagePreprocessing.of(kind(**settings))

    def test_bad_settings(self):
        for arguments in (
            *({"channels": 4}, {"size": (28,)}, {"size": (28, 0)}, {"size": 2.5, "crop": (2, 2)}, {"size": 28}),
            *({"crop": 28}, {"resample": "lanczos"}, {"mean": (0.5, 0.5)}, {"mean": 0.5}, {"std": (0.0,)}),
            {"std": (float("nan"),)},
        ):
            name = "crop" if arguments == {"size": 28} else next(iter(arguments))
            with pytest.raises(ValueError, match=rf"^{name}: [^\n]+$"):
                ImagePreprocessing(**arguments)


class TestImageEncoders:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_as_stock_processor_and_stock_model(self, family, checkpoints):
        model_class, _, stock = FAMILIES[family]
        processor = PROCESSORS[STOCK_PROCESSOR.get(family, family)]
        model = model_class.from_pretrained(checkpoints[family])
        encoder = FilterEncoder.from_pretrained(checkpoints[family])
        found = encoder(IMAGES)
        with torch.no_grad():
            pixels = [processor(image, return_tensors="pt")["pixel_values"] for image in IMAGES]
            wanted = torch.cat([stock(model, part) for part in pixels])
            torch.testing.assert_close(found, stock(model, encoder.preprocessing.prepare(IMAGES)), **CLOSE)
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert encoder.embedding_size == found.shape[1] == wanted.shape[1]
        scale = wanted.std()
        assert scale > 0.01
        assert (found - wanted).abs().max() < 0.1 * scale  # 8 bits
        scaled = FilterEncoder.from_pretrained(checkpoints[family], normalize=True)(IMAGES)
        torch.testing.assert_close(scaled, found / found.pow(2).sum(1, keepdim=True).sqrt(), **CLOSE)

    @pytest.mark.parametrize("family", ["vit", "clip", "dinov2", "resnet"])
    def test_layers_and_poolings(self, family, checkpoints):
        def embedded(**settings):
            return FilterEncoder.from_pretrained(checkpoints[family], **settings)(IMAGES)

        encoder = FilterEncoder.from_pretrained(checkpoints[family])
        pixels = encoder.preprocessing.prepare(IMAGES)
        with torch.no_grad():
            outputs = encoder.model(pixel_values=pixels, output_hidden_states=True)
        for layer, hidden in ((1, outputs.hidden_states[1]), (None, outputs.last_hidden_state)):
            mean = hidden.mean((2, 3)) if hidden.ndim == 4 else hidden[:, 1:].mean(1)  # without the class token
            torch.testing.assert_close(embedded(layer=layer, pooling="mean"), mean, **CLOSE)
            if layer is not None:
                assert FilterEncoder.from_pretrained(checkpoints[family], layer=layer).pooling == "mean"
            if hidden.ndim == 3:
                torch.testing.assert_close(embedded(layer=layer, pooling="first"), hidden[:, 0], **CLOSE)

    def test_mean_leaves_out_registers(self):
        config = transformers.Dinov2WithRegistersConfig(**VISION, num_register_tokens=3)
        model = build(transformers.Dinov2WithRegistersModel, config)
        encoder = FilterEncoder(model, kind="image", pooling="mean")
        images = torch.rand(2, 3, 28, 28) * 2 - 1
        torch.testing.assert_close(encoder(images), model(images).last_hidden_state[:, -4:].mean(1), **CLOSE)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_one_does_not_depend_on_the_others(self, family, checkpoints):
        encoder = FilterEncoder.from_pretrained(checkpoints[family])
        wanted = torch.cat([encoder([image]) for image in IMAGES])
        for batch_size in (None, 2, 3):
            torch.testing.assert_close(encoder(IMAGES, batch_size=batch_size), wanted, **CLOSE)
        images = torch.cat([as_tensor(noise(30, 40, seed=seed)) for seed in range(3)])
        broken = torch.cat([images[:1], images])
        broken[0, 1, 0, 0] = torch.nan  # a corner, which a crop takes away
        found = encoder(broken)
        assert found[0].isnan().all()
        torch.testing.assert_close(found[1:], encoder(images), **CLOSE)
        broken[0, 1, 0, 0] = torch.inf
        assert encoder(broken)[0].isnan().all()
        found = encoder([Image.fromarray(np.full((30, 30), np.nan, np.float32)), *IMAGES]).isnan().any(1)
        assert found.tolist() == [True, False, False, False, False]

    def test_broken_images_are_neither_cleaned_nor_spread_by_the_module(self):
        images = torch.rand(2, 3, 4, 4) - 0.5
        images[1, 0, 0, 0] = torch.nan
        cleaned, spread = (
            lambda images: images.nan_to_num().mean((2, 3)),
            lambda images: images[:, 0, 0] - images.mean(),
        )
        for function in (cleaned, spread):
            encoder = FilterEncoder.own(function, name="careless")
            assert encoder(images).isnan().sum(1).tolist() == [0, encoder.embedding_size]

    def test_modes_gradients_and_autocast(self, checkpoints):
        encoder = FilterEncoder.from_pretrained(checkpoints["resnet"])
        wanted, images = encoder(IMAGES), torch.cat([as_tensor(noise(30, 40))] * 2).requires_grad_()
        encoder.train()
        encoder.model.embedder.eval()
        before = [module.training for module in encoder.modules()]
        statistics = {name: value.clone() for name, value in encoder.state_dict().items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(encoder(IMAGES), wanted, **CLOSE)
        assert not encoder(images).requires_grad
        assert [module.training for module in encoder.modules()] == before
        with pytest.raises(ValueError):
            encoder([])
        assert [module.training for module in encoder.modules()] == before
        assert all(torch.equal(value, statistics[name]) for name, value in encoder.state_dict().items())

    @pytest.mark.parametrize("family", ["clip", "resnet"])
    def test_half_precision(self, family, checkpoints):
        full = FilterEncoder.from_pretrained(checkpoints[family])
        half = FilterEncoder.from_pretrained(checkpoints[family], dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16
        assert half.spec["config"]["dtype"] == "bfloat16"
        wanted, found = full(IMAGES), half(IMAGES)
        assert found.dtype == torch.float32
        assert 0 < (found - wanted).abs().max() < 0.1 * wanted.abs().max()
        torch.testing.assert_close(half(as_tensor(IMAGES[0]).half()), found[:1], atol=0.02, rtol=0.02)

    def test_model_in_memory(self, tiny_vit):
        encoder = FilterEncoder(tiny_vit.vit, kind="image")
        images = torch.rand(2, 1, 16, 16) * 2 - 1
        assert (encoder.preprocessing.channels, encoder.preprocessing.size) == (1, (16, 16))
        torch.testing.assert_close(encoder(images), tiny_vit.vit(images).last_hidden_state[:, 0], **CLOSE)
        assert encoder.embedding_size == 16

    def test_missing_weights_are_refused(self, checkpoints, tmp_path):
        copied(checkpoints["vit"], tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights[next(name for name in weights if name.startswith("vit.") and "layernorm" in name)]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"^name_or_path: [^\n]* lacks 1 weights of ViTModel[^\n]*$"):
            FilterEncoder.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="lacks 2 weights of ViTModel, such as 'pooler"):
            FilterEncoder.from_pretrained(checkpoints["vit"], pooling="pooled")


class TestTexts:
    TEXTS = ["Paris is the capital of France.", "", "fox", "The quick brown fox jumps over the lazy dog. " * 9]

    def test_as_stock_tokenizer_and_stock_model(self, sentences, tokenizer):
        encoder = FilterEncoder.from_pretrained(sentences)
        model = AutoModel.from_pretrained(sentences)
        found = encoder(self.TEXTS)
        assert (encoder.kind, encoder.pooling, encoder.normalize) == ("text", "mean", True)
        for text, embedding in zip(self.TEXTS, found, strict=True):
            ids = tokenizer(text)["input_ids"][:24] or [tokenizer.pad_token_id]
            with torch.no_grad():
                mean = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
            torch.testing.assert_close(embedding, mean / mean.norm(), **CLOSE)
        torch.testing.assert_close(torch.cat([encoder([text]) for text in self.TEXTS]), found, **CLOSE)
        torch.testing.assert_close(encoder(self.TEXTS, batch_size=2), found, **CLOSE)

    def test_layer_first_and_length(self, sentences, tokenizer):
        encoder = FilterEncoder.from_pretrained(sentences, layer=1, pooling="first", normalize=False, max_length=5)
        ids = tokenizer(self.TEXTS[0])["input_ids"][:5]
        hidden = encoder.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(encoder([self.TEXTS[0], ""])[:1], hidden[:, 0], **CLOSE)
        torch.testing.assert_close(encoder([self.TEXTS[3]]), encoder([self.TEXTS[3][:40]]), **CLOSE)

    def test_settings_of_sentence_transformers(self, sentences, tmp_path):
        copied(sentences, tmp_path)
        (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
        (tmp_path / "1_Pooling").mkdir()
        pooling = tmp_path / "1_Pooling" / "config.json"
        pooling.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
        encoder = FilterEncoder.from_pretrained(tmp_path)
        assert (encoder.pooling, encoder.max_length) == ("first", 7)
        assert FilterEncoder.from_pretrained(tmp_path, pooling="mean", max_length=3).max_length == 3
        pooling.write_text('{"pooling_mode_max_tokens": true}')
        with pytest.raises(ValueError, match=r"^pooling: .*max_tokens"):
            FilterEncoder.from_pretrained(tmp_path)

    def test_tokenizer_is_saved_and_read(self, sentences, tmp_path):
        encoder = FilterEncoder.from_pretrained(sentences)
        wanted = encoder(self.TEXTS)
        encoder.save_tokenizer(tmp_path)
        again = FilterEncoder.from_spec(encoder.spec)
        again.model.load_state_dict(encoder.model.state_dict())
        with pytest.raises(ValueError, match=r"^tokenizer: is missing"):
            again(self.TEXTS)
        again.load_tokenizer(tmp_path)
        torch.testing.assert_close(again(self.TEXTS), wanted, **CLOSE)
        for file in tmp_path.iterdir():
            assert "secret-place" not in file.read_text(encoding="utf-8"), file


class TestOwn:
    def test_function_and_module(self):
        images = torch.rand(5, 3, 6, 6) * 2 - 1
        means = FilterEncoder.own(lambda images: images.mean((2, 3)), name="means")
        torch.testing.assert_close(means(images, batch_size=2), images.mean((2, 3)))
        assert means.embedding_size == 3
        linear = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
        encoder = FilterEncoder.own(linear, name="linear", size=(2, 2), channels=1)
        assert encoder.embedding_size == 2
        grey = torch.rand(3, 1, 2, 2) * 2 - 1
        torch.testing.assert_close(encoder(grey), linear(grey.double()).float())
        assert encoder([noise(9, 7), noise(3, 3, "P")]).shape == (2, 2)

    def test_is_not_stored(self):
        encoder = FilterEncoder.own(nn.Flatten(), name="pixels")
        assert not encoder.stored
        assert json.loads(json.dumps(encoder.spec))["name"] == "pixels"
        with pytest.raises(
            ValueError, match=r"^encoder: 'pixels' is the user's own and was not stored; pass encoder="
        ):
            FilterEncoder.from_spec(encoder.spec)
        with pytest.raises(ValueError, match=r"^fingerprint: "):
            encoder.fingerprint()

    def test_bad_output(self):
        for function, message in (
            (lambda images: images, "must give floats"),
            (lambda images: images.flatten(1)[:1], "must give floats"),
            (lambda images: images.flatten(1).long(), "must give floats"),
            (lambda images: None, "must return a tensor"),
            (lambda images: [images.flatten(1)], "must return a tensor"),
        ):
            with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
                FilterEncoder.own(function, name="bad")(torch.zeros(2, 3, 4, 4))

    def test_size_of_embeddings_stays(self):
        encoder = FilterEncoder.own(lambda images: images.flatten(1), name="pixels")
        encoder(torch.zeros(2, 3, 4, 4))
        with pytest.raises(ValueError, match=r"^embedding_size: is not known yet"):
            _ = FilterEncoder.own(nn.Flatten(), name="pixels").embedding_size
        with pytest.raises(ValueError, match="gave embeddings of 48 numbers, and now of 75"):
            encoder(torch.zeros(2, 3, 5, 5))


class TestSaving:
    @pytest.mark.parametrize("family", [*FAMILIES, "text"])
    def test_spec_and_weights_are_the_encoder(self, family, checkpoints, sentences, tmp_path):
        """Also inside of a filter, which has no others beside it."""
        encoder = FilterEncoder.from_pretrained(sentences if family == "text" else checkpoints[family], normalize=True)
        inputs = TestTexts.TEXTS if family == "text" else IMAGES
        assert encoder.stored
        assert "secret-place" not in json.dumps(encoder.spec)
        again = FilterEncoder.from_spec(json.loads(json.dumps(encoder.spec)))
        again.tokenizer, wanted = encoder.tokenizer, encoder(inputs)
        assert not torch.allclose(again(inputs), wanted, atol=0.01)
        again.load_state_dict(encoder.state_dict())
        torch.testing.assert_close(again(inputs), wanted, **CLOSE)
        assert again.spec == encoder.spec
        assert all(name.startswith("model.") for name in encoder.state_dict())
        fitter = FASTFitter(encoder, score="mean_difference").update(undesired=inputs[:2], clean=inputs[2:])
        fitter.fit(threshold="pooled_mean").checker().save_pretrained(tmp_path)
        checker, info = FASTSafetyChecker.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        torch.testing.assert_close(checker.encoder(inputs), wanted, **CLOSE)
        assert checker.encoder.fingerprint() == encoder.fingerprint()

    def test_from_spec_does_not_need_memory(self, resnet):
        with torch.device("meta"):
            empty = FilterEncoder.from_spec(resnet.spec)
        assert empty.device.type == "meta"
        assert empty.embedding_size == 16
        empty._embedding_size = None
        with pytest.raises(ValueError, match=r"^embedding_size: is not known"):
            _ = empty.embedding_size

    def test_fingerprint(self, resnet, checkpoints):
        """Of all weights and buffers, in any order, with their names, shapes and dtypes."""
        found, state = resnet.fingerprint(), resnet.model.state_dict()
        assert found == FilterEncoder.from_pretrained(checkpoints["resnet"]).fingerprint()
        assert len(found) == 64
        resnet.model.state_dict = lambda: dict(reversed(state.items()))
        assert resnet.fingerprint() == found
        del resnet.model.state_dict
        buffer = next(name for name in state if name.endswith("running_mean"))
        for tensor, place in ((next(resnet.model.parameters()).view(-1), -1), (resnet.model.get_buffer(buffer), 0)):
            tensor[place] += 1e-4
            assert resnet.fingerprint() != found
            found = resnet.fingerprint()

        def of(name, value):
            module = nn.Module()
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
            return FilterEncoder.own(module.requires_grad_(False), name="one").fingerprint()

        zeros = torch.zeros(4)
        values = [of("a", zeros), of("b", zeros), of("a", zeros[None]), of("a", torch.zeros(8).half())]
        assert len(set(values)) == 4
        assert of("a", torch.ones(3, 2).t()) == of("a", torch.ones(2, 3))
        assert of("a", torch.tensor(1.0)) != of("a", torch.tensor(2.0))

    @pytest.mark.parametrize("family", ["clip", "text"])
    def test_reference(self, family, checkpoints, sentences, tmp_path):
        folder = sentences if family == "text" else checkpoints[family]
        inputs = TestTexts.TEXTS if family == "text" else IMAGES
        snapshot = _as_cached(folder, tmp_path)
        encoder = FilterEncoder.from_pretrained("me/encoder", store=False, cache_dir=tmp_path, dtype=torch.bfloat16)
        assert not encoder.stored
        reference = {"id": "me/encoder", "revision": COMMIT, "dtype": "bfloat16", "sha256": encoder.fingerprint()}
        assert encoder.reference == reference
        again = FilterEncoder.from_reference(encoder.spec, cache_dir=tmp_path)
        torch.testing.assert_close(again(inputs), encoder(inputs), rtol=2**-6, atol=2**-6)  # 16 bits
        assert again.spec == encoder.spec
        moved = encoder.spec | {"reference": encoder.reference | {"revision": "f" * 40}}
        with pytest.raises(OSError, match=r"^[^\n]+$"):
            FilterEncoder.from_reference(moved, cache_dir=tmp_path)
        weights = load_file(snapshot / "model.safetensors")
        weights[next(name for name in weights if "embeddings.position_embedding" in name and "text" not in name)] += 1
        save_file(weights, snapshot / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"^reference: weights of 'me/encoder' at 0123456789[^\n]*$"):
            FilterEncoder.from_reference(encoder.spec, cache_dir=tmp_path)


def _as_cached(folder: Path, cache: Path) -> Path:
    """The folder as if it had been loaded from the Hub."""
    repository = cache / "models--me--encoder"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    copied(folder, snapshot)
    return snapshot


class TestBadInput:
    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ([], "inputs: are empty"),
            (torch.zeros(0, 3, 8, 8), "inputs: are empty"),
            (noise(8, 8), r"images: .* got Image; wrap it as \[image\]"),
            (torch.zeros(3, 8, 8), r"images: .*\[n, c, h, w\]"),
            (torch.tensor(1.0), "inputs: are empty"),
            ([torch.zeros(3, 8, 8)], "images: .* got Tensor in a list"),
            ([noise(8, 8), None], "images: .* got NoneType in a list"),
            ("cat.png", "images: .* got str"),
            (np.zeros((1, 3, 8, 8)), "images: .* got ndarray"),
            (torch.zeros(1, 2, 8, 8), "images: .* got 2"),
            (torch.zeros(1, 4, 8, 8), "images: .* got 4"),
            (torch.zeros(1, 5, 8, 8), "images: .* got 5"),
            (torch.zeros(1, 3, 0, 8), "images: must be"),
            (torch.full((2, 3, 8, 8), 1.5), r"images: pixel values reach 1.5, .*\[−1, 1\]"),
            (torch.full((2, 3, 8, 8), -255.0), r"images: pixel values reach 255, .*\[−1, 1\]"),
            ([noise(8, 8), Image.new("RGB", (0, 5))], "images: image 1 is 0 × 5"),
            ([Image.new("I", (4, 4), 65535)], r"images: image 0 .* to 65535; .*\[0, 255\]"),
            ([Image.new("F", (4, 4), -3.0)], r"images: image 0 .* from -3 .*\[0, 255\]"),
        ],
    )
    def test_images(self, resnet, inputs, message):
        with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
            resnet(inputs)

    def test_cut_off_file(self, resnet, tmp_path):
        noise(64, 64).save(tmp_path / "whole.png")
        (tmp_path / "part.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
        with pytest.raises(ValueError, match=r"^images: image 0 of mode 'RGB' cannot be read[^\n]*$"):
            resnet([Image.open(tmp_path / "part.png")])

    def test_sizes_that_stay(self):
        encoder = FilterEncoder.own(lambda images: images.mean((2, 3)), name="means")
        with pytest.raises(ValueError, match=r"^images: have shapes [^\n]* set size"):
            encoder([noise(4, 4), noise(5, 4)])

    def test_texts(self, sentences):
        encoder = FilterEncoder.from_pretrained(sentences)
        for inputs in ("one text", [1, 2], ["a", None], [noise(4, 4)], torch.zeros(2, 3, 4, 4), None):
            with pytest.raises(ValueError, match=r"^texts: must be [^\n]*$"):
                encoder(inputs)

    def test_batch_size(self, resnet):
        for batch_size in (0, -1, 2.0, "8"):
            with pytest.raises(ValueError, match=r"^batch_size: "):
                resnet(IMAGES, batch_size=batch_size)

    def test_arguments(self, checkpoints):
        for arguments in (
            *(
                {"pooling": "first"},
                {"pooling": "max"},
                {"layer": 9},
                {"layer": -9},
                {"layer": 1, "pooling": "pooled"},
            ),
            *(
                {"layer": True},
                {"max_length": 0},
                {"store": False},
                {"trust_remote_code": True},
                {"device_map": "auto"},
            ),
        ):
            with pytest.raises(ValueError, match=rf"^{next(iter(arguments))}: [^\n]*$"):
                FilterEncoder.from_pretrained(checkpoints["resnet"], **arguments)

    def test_models(self, resnet):
        config = FASTConfig(schema_version=1, concepts=[{"name": "a"}], embedding_size=4)
        for make, word in (
            (lambda: FilterEncoder(nn.Linear(2, 2), kind="image"), "model: Linear is not of transformers"),
            (lambda: FilterEncoder(FASTSafetyChecker(config), kind="image"), "model: FASTSafetyChecker is not of"),
            (lambda: FilterEncoder(resnet.model, kind="audio"), "kind: "),
            (lambda: FilterEncoder.own(3, name="three"), "module: "),
            (lambda: FilterEncoder.own(nn.Flatten(), name=""), "name: "),
        ):
            with pytest.raises(ValueError, match=f"^{word}"):
                make()

    def test_checkpoints(self, resnet, tiny_vit, tmp_path):
        def refused(words, name=tmp_path, **arguments):
            with pytest.raises((OSError, ValueError), match=rf"^{words}[^\n]*$") as error:
                FilterEncoder.from_pretrained(name, **arguments)
            return error.value

        for nothing in (tmp_path / "nothing", "nobody/nothing"):
            assert isinstance(refused("name_or_path: ", nothing), OSError)
        resnet.model.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"half a file")
        refused("name_or_path: ")
        next(resnet.model.parameters()).fill_(torch.nan)
        resnet.model.save_pretrained(tmp_path)
        refused("name_or_path: [^\n]* not finite in float32", preprocessing=resnet.preprocessing)
        tiny_vit.save_pretrained(tmp_path)
        refused("preprocessing: ")
        config = json.loads((tmp_path / "config.json").read_text())
        own_code = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
        (tmp_path / "config.json").write_text(json.dumps(config | own_code))
        refused("name_or_path: ")
        config = transformers.T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=20)
        build(transformers.T5Model, config).save_pretrained(tmp_path / "t5")
        refused("name_or_path: [^\n]* is neither one image encoder nor one text", tmp_path / "t5")
        config = transformers.ViTMAEConfig(**VISION | {"patch_size": 2})  # two draws of 49 out of 196 are different
        for part in (build(transformers.ViTMAEModel, config), PROCESSORS["vit"]):
            part.save_pretrained(tmp_path / "mae")
        refused("name_or_path: ViTMAEModel gives another embedding each time", tmp_path / "mae", pooling="mean")

    def test_specs(self, resnet):
        spec = resnet.spec
        for change in (
            *(
                {"kind": "audio"},
                {"architecture": "FilterEncoder"},
                {"architecture": "AutoModel"},
                {"architecture": "os"},
            ),
            *({"architecture": None}, {"config": None}, {"config": {"hidden_sizes": "x"}}, {"pooling": "max"}),
            *({"config": {"hidden_sizes": [8], "depths": None}}, {"preprocessing": {"colour": 3}}),
            {"preprocessing": {"channels": 7}},
        ):
            with pytest.raises(ValueError, match=r"^(spec|pooling|channels): [^\n]*$"):
                FilterEncoder.from_spec(spec | change)
        lacking = [{key: value for key, value in spec.items() if key != name} for name in spec]
        for incomplete in (None, [], "resnet", *lacking):
            with pytest.raises(ValueError, match=r"^spec: [^\n]*$"):
                FilterEncoder.from_spec(incomplete)
        with pytest.raises(ValueError, match=r"^spec: has no complete reference"):
            FilterEncoder.from_reference(spec)

    def test_code_in_a_spec_is_dropped(self, resnet):
        spec = resnet.spec
        spec["config"] |= {"auto_map": {"AutoModel": "evil.Model"}, "_attn_implementation": "evil/kernel"}
        assert FilterEncoder.from_spec(spec).spec == resnet.spec
