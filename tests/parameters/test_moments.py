"""Mean and variance over checkpoints in every layout that the libraries write, against numpy in float64; and refusals."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from hf_unlearn.parameters import moments as moments_module
from hf_unlearn.parameters.anchors import QuadraticAnchor
from hf_unlearn.parameters.moments import ParameterMoments


UNET_FILE = "diffusion_pytorch_model.safetensors"
LIKE = {"weight": torch.zeros(3, 2), "scale": torch.zeros(())}


def unet(seed):
    """Eight by eight pixels; `seed` moves the parameters a little, as training would."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
            norm_num_groups=4, attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def unets():
    return [unet(seed) for seed in (1, 2, 3)]


def parameters_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def random_checkpoint(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator).to(dtype) for name, value in LIKE.items()}


def write(tensors, folder, file=UNET_FILE):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / file)
    return folder


def write_random(tmp_path, count=3):
    return [write(random_checkpoint(seed), tmp_path / f"model-{seed}") for seed in range(count)]


def assert_moments_of(moments, checkpoints):
    """They are numpy's in fp64: the mean to fp32's rounding of the values, the variance to a relative error."""
    assert moments.count == len(checkpoints)
    assert moments.mean.keys() == moments.variance.keys() == checkpoints[0].keys()
    for name, like in checkpoints[0].items():
        values = np.stack([checkpoint[name].detach().double().numpy() for checkpoint in checkpoints])
        mean, variance = moments.mean[name], moments.variance[name]
        assert mean.dtype == variance.dtype == torch.float32
        assert mean.shape == variance.shape == like.shape
        np.testing.assert_allclose(mean.numpy(), values.mean(0), rtol=0, atol=2e-7 * abs(values).max())
        np.testing.assert_allclose(variance.numpy(), values.var(0, ddof=1), rtol=1e-5, atol=0)


class TestLayouts:
    @pytest.mark.parametrize("layout", ["models", "pipelines", "shards of a run"])
    def test_of_diffusers(self, layout, unets, tmp_path):
        folders = [tmp_path / f"checkpoint-{step}" for step in range(len(unets))]
        for model, folder in zip(unets, folders, strict=True):
            if layout == "models":
                model.save_pretrained(folder)
            elif layout == "pipelines":
                DDPMPipeline(model, DDPMScheduler(num_train_timesteps=10)).save_pretrained(folder)
            else:
                model.save_pretrained(folder / "unet", max_shard_size="20KB")
        if layout == "shards of a run":
            assert len(list(tmp_path.glob("*/unet/diffusion_pytorch_model-*-of-*.safetensors"))) > 4
        given = tmp_path if layout == "shards of a run" else [str(folder) for folder in folders]
        moments = ParameterMoments.from_checkpoints(given, parameters_of(unets[0]))
        assert_moments_of(moments, [parameters_of(model) for model in unets])

    def test_of_transformers(self, tiny_gpt2, tmp_path):
        checkpoints = []
        for step, size in ((5, "10GB"), (10, "20KB"), (15, "10GB")):
            with torch.no_grad():
                for parameter in tiny_gpt2.parameters():
                    parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))
            checkpoints.append({name: value.clone() for name, value in parameters_of(tiny_gpt2).items()})
            tiny_gpt2.save_pretrained(tmp_path / f"checkpoint-{step}", max_shard_size=size)
        assert (tmp_path / "checkpoint-10" / "model.safetensors.index.json").is_file()
        assert_moments_of(ParameterMoments.from_checkpoints(str(tmp_path), checkpoints[0]), checkpoints)

    def test_subfolder_names_the_model_and_goes_first(self, tmp_path):
        kinds = {"unet": 0, "unet_ema": 10, ".": 20}
        for step in (1, 2):
            for folder, seed in kinds.items():
                write(random_checkpoint(seed + step), tmp_path / f"checkpoint-{step}" / folder)
        for folder, seed in {**kinds, "absent": 20}.items():
            moments = ParameterMoments.from_checkpoints(tmp_path, LIKE, subfolder=folder)
            assert_moments_of(moments, [random_checkpoint(seed + step) for step in (1, 2)])

    def test_one_folder_stands_for_its_checkpoints_in_the_order_of_steps(self, tmp_path, monkeypatch):
        for step in (10, 9, 200):
            write(random_checkpoint(step), tmp_path / f"checkpoint-{step}" / "unet")
        write(random_checkpoint(0), tmp_path / "unet")  # the trained model, beside its checkpoints
        write(random_checkpoint(0), tmp_path / "checkpoint-9-old" / "unet")
        (tmp_path / "checkpoint-11").touch()
        monkeypatch.chdir(tmp_path)
        for given in (tmp_path, str(tmp_path), [tmp_path], (str(tmp_path),), "."):
            moments = ParameterMoments.from_checkpoints(given, LIKE)
            assert_moments_of(moments, [random_checkpoint(step) for step in (9, 10, 200)])
        for step in (10, 9, 200):
            write({"other": torch.ones(1)}, tmp_path / f"checkpoint-{step}" / "unet")
        with pytest.raises(ValueError, match="checkpoint-9/"):
            ParameterMoments.from_checkpoints(tmp_path, LIKE)

    def test_in_a_list_a_folder_stands_for_itself(self, tmp_path):
        write(random_checkpoint(1), tmp_path / "checkpoint-1" / "unet")
        write(random_checkpoint(2), tmp_path / "unet")
        moments = ParameterMoments.from_checkpoints([tmp_path / "checkpoint-1", tmp_path], LIKE)
        assert_moments_of(moments, [random_checkpoint(1), random_checkpoint(2)])

    def test_hub_downloads_only_the_weights_of_the_model(self, tmp_path, monkeypatch):
        folders = {f"someone/model-{i}": tmp_path / "hub" / str(i) for i in (1, 2)}
        hub = {
            name: write(random_checkpoint(int(name[-1])), folder / "unet").parent for name, folder in folders.items()
        }
        for repository in hub.values():
            for file in (
                "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors",
                "unet/diffusion_pytorch_model-00001-of-00002.safetensors", "text_encoder/model.safetensors",
                "text_encoder/model-00001-of-00002.safetensors", "v1-5-pruned.safetensors",
            ):  # fmt: skip
                (repository / file).parent.mkdir(exist_ok=True)
                (repository / file).touch()

        def download(repo_id, allow_patterns):
            files = [str(p.relative_to(hub[repo_id])) for p in hub[repo_id].rglob("*") if p.is_file()]
            for file in filter_repo_objects(files, allow_patterns=allow_patterns):
                target = tmp_path / "cache" / repo_id / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(hub[repo_id] / file, target)
            return str(tmp_path / "cache" / repo_id)

        monkeypatch.setattr(moments_module, "snapshot_download", download)
        moments = ParameterMoments.from_checkpoints(list(hub), LIKE)
        assert_moments_of(moments, [random_checkpoint(i) for i in (1, 2)])
        downloaded = tmp_path / "cache" / "someone" / "model-1"
        assert sorted(str(p.relative_to(downloaded)) for p in downloaded.rglob("*") if p.is_file()) == [
            "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
            "unet/diffusion_pytorch_model.safetensors",
        ]


class TestValues:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_types_are_read_as_fp32(self, dtype, tmp_path):
        checkpoints = [random_checkpoint(seed, dtype) for seed in range(5)]
        folders = [write(tensors, tmp_path / str(i)) for i, tensors in enumerate(checkpoints)]
        assert_moments_of(ParameterMoments.from_checkpoints(folders, LIKE), checkpoints)

    @pytest.mark.parametrize("outlier", [0.0, 1e-2, 1.0])
    def test_a_small_variance_around_a_large_mean(self, outlier, tmp_path):
        generator = torch.Generator().manual_seed(0)
        checkpoints = [{"p": 1e4 + 1e-3 * torch.randint(-3, 4, (1000,), generator=generator)} for _ in range(20)]
        checkpoints[0]["p"] -= outlier  # differences are taken from the first one
        folders = [write(tensors, tmp_path / str(i)) for i, tensors in enumerate(checkpoints)]
        moments = ParameterMoments.from_checkpoints(folders, {"p": torch.zeros(1000)})
        assert_moments_of(moments, checkpoints)

    def test_one_checkpoint_is_its_own_mean_without_variance(self, tmp_path):
        folders = write_random(tmp_path, 1)
        moments = ParameterMoments.from_checkpoints(folders, LIKE)
        with (folders[0] / UNET_FILE).open("r+b") as stream:  # in place: files are mapped into memory
            stream.seek(-24, 2)
            stream.write(b"\0" * 24)
        torch.testing.assert_close(moments.mean, random_checkpoint(0), rtol=0, atol=0)
        assert moments.count == 1
        assert all((v == 0).all() for v in moments.variance.values())
        with pytest.raises(ValueError, match="^checkpoints: a single one has no variance"):
            moments.precision(0.1)

    def test_what_is_not_wanted_is_not_read(self, unets, tmp_path):
        """Its shards may be gone, and it may hold anything."""
        names = list(parameters_of(unets[0]))
        for step in (0, 1):
            folder = tmp_path / f"checkpoint-{step}" / "unet"
            unets[step].save_pretrained(folder, max_shard_size="20KB")
            shards = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
            wanted = [name for name in names if shards[name] == shards[names[0]]]
            for shard in set(shards.values()) - {shards[names[0]]}:
                (folder / shard).unlink()
        assert 0 < len(wanted) < len(names)
        moments = ParameterMoments.from_checkpoints(tmp_path, {name: parameters_of(unets[0])[name] for name in wanted})
        assert_moments_of(moments, [{name: parameters_of(unet)[name] for name in wanted} for unet in unets[:2]])

        more = {"position_ids": torch.arange(3), "unwanted": torch.full((2,), torch.nan)}
        folders = [write(random_checkpoint(i) | more, tmp_path / f"single-{i}") for i in (0, 1)]
        assert ParameterMoments.from_checkpoints(folders, LIKE).mean.keys() == LIKE.keys()

    def test_save_and_load(self, tmp_path):
        moments = ParameterMoments.from_checkpoints(write_random(tmp_path), LIKE)
        moments.save(tmp_path / "new" / "moments.safetensors")
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["moments.safetensors"]
        loaded = ParameterMoments.load(tmp_path / "new" / "moments.safetensors")
        torch.testing.assert_close((loaded.mean, loaded.variance), (moments.mean, moments.variance), rtol=0, atol=0)
        assert loaded.count == moments.count
        on_meta = ParameterMoments.load(tmp_path / "new" / "moments.safetensors", torch.device("meta"))
        assert {tensor.device.type for tensor in (*on_meta.mean.values(), *on_meta.variance.values())} == {"meta"}


class TestPrecision:
    MOMENTS = ParameterMoments(
        mean={"a": torch.zeros(3), "b": torch.zeros(())},
        variance={"a": torch.tensor([0.0, 1.0, 8.0]), "b": torch.tensor(3.0)},
        count=3,
    )

    @pytest.mark.parametrize(
        ("floor", "a", "b"),
        [
            (1e-3, [0.5 / 3e-3, 0.5, 0.5 / 8], 0.5 / 3),  # the mean over the four elements is 3
            (0.5, [0.5 / 1.5, 0.5 / 1.5, 0.5 / 8], 0.5 / 3),
            (100.0, [0.5 / 300] * 3, 0.5 / 300),
        ],
    )
    def test_floor_is_a_share_of_the_mean_over_all_elements(self, floor, a, b):
        precision = self.MOMENTS.precision(floor)
        torch.testing.assert_close(precision, {"a": torch.tensor(a), "b": torch.tensor(b)})

    def test_anchor_is_the_stability_term(self, tmp_path):
        checkpoints, folders = [random_checkpoint(seed) for seed in range(3)], write_random(tmp_path)
        moments = ParameterMoments.from_checkpoints(folders[::-1], LIKE)  # their order does not matter
        anchor = QuadraticAnchor(moments.mean, diagonal=moments.precision(1e-12), diagonal_weight=1.0)
        point, expected = random_checkpoint(7), 0.0
        for name, value in point.items():
            values = torch.stack([checkpoint[name] for checkpoint in checkpoints])
            expected += ((value - values.mean(0)).square() / (2 * values.var(0))).sum()
        torch.testing.assert_close(anchor.value(point)["fisher"], expected)

    def test_refuses_a_floor_that_is_none(self):
        for floor in (0, -0.1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"^floor={floor}: .*must be > 0$"):
                self.MOMENTS.precision(floor)


class TestErrors:
    def refused(self, checkpoints, *parts, like=LIKE, argument="checkpoints", **options):
        with pytest.raises(ValueError) as caught:
            ParameterMoments.from_checkpoints(checkpoints, like, **options)
        message = str(caught.value)
        assert message.startswith(f"{argument}: ")
        assert "\n" not in message
        for part in parts:
            assert str(part) in message

    def test_nothing_given_or_wanted(self, tmp_path):
        self.refused([], "empty")
        self.refused(write_random(tmp_path), "empty", like={}, argument="like")

    @pytest.mark.parametrize("name", ["nobody/no-such-model", "no/such/folder", "a b"])
    def test_neither_folder_nor_hub_id(self, name, tmp_path):
        self.refused([*write_random(tmp_path), name], name, "neither a folder nor a Hub model")

    def test_no_safetensors_or_broken_ones(self, tmp_path):
        (tmp_path / "unet").mkdir()
        for file in (None, "diffusion_pytorch_model.bin", "unet/pytorch_model.bin"):
            if file:
                (tmp_path / file).touch()
            self.refused([tmp_path], tmp_path, UNET_FILE, "unet/", "only safetensors")
        folders = write_random(tmp_path)
        file = folders[1] / UNET_FILE
        file.write_bytes(file.read_bytes()[:-4])
        self.refused(folders, file, "cannot be read")

    def test_missing_shard_and_broken_index(self, unets, tmp_path):
        unets[0].save_pretrained(tmp_path, max_shard_size="20KB")
        shard = sorted(tmp_path.glob("*-of-*.safetensors"))[-1]
        shard.unlink()
        self.refused([tmp_path], shard, "cannot be read", like=parameters_of(unets[0]))
        index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
        for text in ("{}", '{"weight_map": {'):
            index.write_text(text)
            self.refused([tmp_path], index, "cannot be read", like=parameters_of(unets[0]))

    @pytest.mark.parametrize("size", ["20KB", "10GB"])
    def test_another_architecture(self, size, unets, tmp_path):
        unets[1].save_pretrained(tmp_path / "b", max_shard_size=size)
        like = parameters_of(unets[0])
        more = {**like, "conv_in.lora_A.default.weight": torch.zeros(2)}
        self.refused([tmp_path / "b"], tmp_path / "b", "no conv_in.lora_A.default.weight", like=more)
        wider = {**like, "conv_in.bias": torch.zeros(9)}
        self.refused([tmp_path / "b"], tmp_path / "b", "conv_in.bias has shape (8,), not (9,)", like=wider)

    def test_one_of_two_that_does_not_do(self, tmp_path):
        folders = write_random(tmp_path, 2)
        for value in (float("nan"), float("-inf")):
            write(random_checkpoint(1) | {"scale": torch.tensor(value)}, folders[1])
            self.refused(folders, folders[1], "NaN or infinity in scale")
        write({"weight": torch.zeros(2, 3), "scale": torch.zeros(())}, folders[1])
        self.refused(folders, folders[1], "another architecture", "(2, 3)")

    def test_same_checkpoint_twice(self, tmp_path):
        folders = write_random(tmp_path)
        (tmp_path / "link").symlink_to(folders[0])
        for again in (folders[0], f"{folders[1]}/../{folders[0].name}", tmp_path / "link"):
            self.refused([*folders, again], again, "twice")
        self.refused([tmp_path / "link", folders[0]], folders[0], "twice")
        write(random_checkpoint(0), tmp_path / "checkpoint-1" / "unet")
        self.refused([tmp_path / "checkpoint-1", tmp_path / "checkpoint-1" / "unet"], "twice")

    def test_identical_checkpoints(self, tmp_path):
        folders = [write(random_checkpoint(0), tmp_path / str(i)) for i in range(3)]
        self.refused(folders, "all 3", "no variance")
        write(random_checkpoint(0) | {"scale": torch.tensor(1.0)}, folders[2])
        moments = ParameterMoments.from_checkpoints(folders, LIKE)
        assert (moments.variance["weight"] == 0).all()
        assert moments.variance["scale"] > 0
