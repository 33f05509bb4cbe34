"""Write Stable Diffusion folders and a preference set of toy size, in the real formats.

The folders hold what those of the published SD1.5, SDXL and SD3.5 hold: the same classes, files,
schedules and conventions, with few and random weights. The pairs have the columns of Pick-a-Pic v2.
A script that trains on these trains on the real ones when its paths are changed. So every code path
can be tried on a laptop. Nothing is downloaded.

    python toy/make_tiny.py [FOLDER]    # makes tiny-{sd15,sdxl,sd35,clip}/ and pairs.parquet

Without FOLDER they go to toy/.
"""

import argparse
import io
import os
import random
import shutil
from pathlib import Path

import diffusers
import pyarrow.parquet
import torch
import transformers
from PIL import Image, ImageDraw
from tokenizers.pre_tokenizers import ByteLevel

# The configurations of the parts, where they differ from the libraries' defaults. These are the
# published ones.
VAE = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
FULL_VAE = VAE | {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
          "num_hidden_layers": 12, "hidden_act": "quick_gelu", "projection_dim": 768}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
          "num_hidden_layers": 32, "hidden_act": "gelu", "projection_dim": 1280}
SDXL_UNET = {  # SD1.5's has the blocks that diffusers has by default
    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
    "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20), "cross_attention_dim": 768 + 1280, "sample_size": 128,
    "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 6 * 256 + 1280}
SD3_VAE = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609,
           "use_quant_conv": False, "use_post_quant_conv": False}
SD35_TRANSFORMER = {
    "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
    "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
          "vocab_size": 32128, "feed_forward_proj": "gated-gelu"}
PUBLISHED = {
    "sd15": {"unet": {"sample_size": 64, "cross_attention_dim": 768},
             "vae": FULL_VAE | {"sample_size": 512, "scaling_factor": 0.18215},
             "encoders": [CLIP_L]},
    "sdxl": {"unet": SDXL_UNET,
             "vae": FULL_VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
             "encoders": [CLIP_L, CLIP_G]},
    "sd35": {"transformer": SD35_TRANSFORMER, "vae": FULL_VAE | SD3_VAE | {"sample_size": 1024},
             "encoders": [CLIP_L, CLIP_G], "t5": T5_XXL}}

# These are the tiny ones. Two text encoders have widths of 24 and 32, so that swapping them shows.
TINY_VAE = VAE | {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 8, "sample_size": 64}
TINY_UNET = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1,
             "norm_num_groups": 8}
TINY_CLIP = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4,
             "num_hidden_layers": 2,  # the least that has a last but one hidden state
             "hidden_act": "quick_gelu", "projection_dim": 32, "vocab_size": 514}
TINY = {
    "sd15": {"unet": TINY_UNET | {
                 "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                 "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                 "attention_head_dim": 4, "cross_attention_dim": 32},
             "vae": TINY_VAE | {"scaling_factor": 0.18215}, "encoders": [TINY_CLIP]},
    "sdxl": {"unet": SDXL_UNET | TINY_UNET | {
                 "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                 "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                 "transformer_layers_per_block": (1, 2), "attention_head_dim": (2, 4),
                 "cross_attention_dim": 24 + 32, "addition_time_embed_dim": 8,
                 "projection_class_embeddings_input_dim": 6 * 8 + 32},
             "vae": TINY_VAE | {"scaling_factor": 0.13025},
             "encoders": [TINY_CLIP | {"hidden_size": 24, "intermediate_size": 96,
                                       "projection_dim": 24},
                          TINY_CLIP | {"hidden_act": "gelu"}]}}
TINY["sd35"] = {
    "transformer": {"sample_size": 8, "num_layers": 3, "attention_head_dim": 8,
                    "num_attention_heads": 2, "joint_attention_dim": 64, "qk_norm": "rms_norm",
                    "caption_projection_dim": 16, "pooled_projection_dim": 24 + 32,
                    "pos_embed_max_size": 12, "dual_attention_layers": (0, 1)},
    "vae": TINY_VAE | SD3_VAE, "encoders": TINY["sdxl"]["encoders"],
    "t5": {"d_model": 64, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2,
           "vocab_size": 128, "feed_forward_proj": "gated-gelu"}}

COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 80, 200),
           "yellow": (245, 215, 60)}
SHAPES = ("circle", "square", "triangle")


def make_tokenizers(n):
    """The tokenizers of `n` text encoders, and the ids of the tokens that begin and end a text.

    They know letters and no words.
    """
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(tokens)}
    pads = ("<|endoftext|>", "!")  # SDXL's second one pads with another token than the first
    tokenizers = [transformers.CLIPTokenizer(ids, merges=[], model_max_length=77, pad_token=pad)
                  for pad in pads[:n]]
    return tokenizers, ids["<|startoftext|>"], ids["<|endoftext|>"]


def make_t5_tokenizer():
    """The tokenizer of SD3's third text encoder. It knows characters, too."""
    tokens = ["<pad>", "</s>", "<unk>", "\N{LOWER ONE EIGHTH BLOCK}", *map(chr, range(33, 127))]
    return transformers.T5Tokenizer([(token, 0.0) for token in tokens], extra_ids=0,
                                    model_max_length=512)


def assemble(vae, encoders, unet=None, transformer=None, t5=None, device="cpu",
             prediction_type="epsilon"):
    """A pipeline with random weights in fp32, from the configurations of its parts.

    With a transformer it is built like SD3, with or without T5. Otherwise it is built like SD1.5
    with one text encoder, and like SDXL with two.
    """
    tokenizers, bos, eos = make_tokenizers(len(encoders))
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
    with_projection = transformers.CLIPTextModelWithProjection
    with torch.device(device):
        first = with_projection if transformer else transformers.CLIPTextModel
        parts = {"tokenizer": tokenizers[0],
                 "text_encoder": first(transformers.CLIPTextConfig(**encoders[0] | ids)).eval()}
        if len(encoders) == 2:
            parts |= {"tokenizer_2": tokenizers[1], "text_encoder_2": with_projection(
                transformers.CLIPTextConfig(**encoders[1] | ids)).eval()}
        if unet:
            parts["unet"] = diffusers.UNet2DConditionModel(**unet)
        parts["vae"] = diffusers.AutoencoderKL(**vae).eval()
        if transformer:
            return diffusers.StableDiffusion3Pipeline(
                **parts, transformer=diffusers.SD3Transformer2DModel(**transformer),
                tokenizer_3=make_t5_tokenizer() if t5 else None,
                text_encoder_3=t5 and transformers.T5EncoderModel(
                    transformers.T5Config(**t5)).eval(),
                scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                "steps_offset": 1, "prediction_type": prediction_type}
    if len(encoders) == 1:
        return diffusers.StableDiffusionPipeline(
            **parts, scheduler=diffusers.PNDMScheduler(
                **schedule, skip_prk_steps=True, set_alpha_to_one=False),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return diffusers.StableDiffusionXLPipeline(
        **parts, scheduler=diffusers.EulerDiscreteScheduler(**schedule, timestep_spacing="leading"),
        add_watermarker=False)


def make_model(folder, kind, **other):
    """Write a pipeline of `kind` "sd15", "sdxl" or "sd35" for images of 64 x 64 pixels to `folder`.

    Its random weights are the same every time. `other` parts replace those of TINY. A pipeline that
    was in the folder is replaced. Raises OSError if the folder holds something else.
    """
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):  # the weights are made on the CPU
        torch.default_generator.manual_seed(0)
        pipeline = assemble(**TINY[kind] | other)
    beside = folder.with_name(folder.name + ".new")
    pipeline.save_pretrained(beside)
    if (folder / "model_index.json").exists():
        shutil.rmtree(folder)
    beside.replace(folder)


def make_scorer(folder):
    """Write a random CLIPModel and its processor to `folder`, as CLIP's lie on the hub."""
    folder = Path(folder)
    clip = assemble(**TINY["sd15"])
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8)
    config = transformers.CLIPConfig(
        text_config=clip.text_encoder.config.to_dict(), vision_config=vision.to_dict(),
        projection_dim=16)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = transformers.CLIPModel(config)
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 32},
                                           crop_size={"height": 32, "width": 32}),
        clip.tokenizer)
    for part in (model, processor):
        part.save_pretrained(folder)


def shape_jpeg(rng, shape, colour, ground, size):
    """A JPEG of a shape, as bytes. Its place and size vary, and at times the frame does."""
    width, height = rng.choice([(size, size)] * 3 + [(size * 5 // 4, size), (size, size * 9 // 8)])
    image = Image.new("RGB", (width, height), COLOURS[ground])
    x, y = (side / 2 + rng.uniform(-0.1, 0.1) * size for side in (width, height))
    r, pen = rng.uniform(0.2, 0.35) * size, ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), COLOURS[colour])
    else:
        corners = {"square": 4, "triangle": 3}[shape]
        pen.regular_polygon((x, y, r), corners, fill=COLOURS[colour])

    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def make_pairs(path, n=64, size=96, seed=0, ties=0.125):
    """Write a parquet file of `n` pairs to `path`, with images of `size` pixels or a little more.

    The preferred image shows what the caption says, and the rejected one does not. A share `ties`
    of the pairs are ties, in which both images show it.
    """
    rng, path = random.Random(seed), Path(path)
    decided = n - round(ties * n)
    labels = [rng.choice((0.0, 1.0)) if i < decided else 0.5 for i in range(n)]
    rng.shuffle(labels)

    rows = []
    for label in labels:
        # Three distinct colours, so that a wrong one can be told from the ground, too.
        colour, other, ground = rng.sample([*COLOURS], 3)
        shape, wrong = rng.sample(SHAPES, 2)
        first = second = (shape, colour, ground)
        if label != 0.5:
            second = rng.choice([(shape, other, ground), (wrong, colour, ground)])
        jpgs = [shape_jpeg(rng, *what, size) for what in (first, second)]
        if label == 0.0:
            jpgs.reverse()
        rows.append({"caption": f"a {colour} {shape} on a {ground} ground", "jpg_0": jpgs[0],
                     "jpg_1": jpgs[1], "label_0": label, "label_1": 1.0 - label})
    beside = path.with_name(path.name + ".new")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), beside)
    beside.replace(path)


def main(argv=None):
    """Write all of it, and say what to run next."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=Path(__file__).parent, type=Path)
    folder = Path(os.path.relpath(parser.parse_args(argv).folder))
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()

    folder.mkdir(parents=True, exist_ok=True)
    for kind in TINY:
        make_model(folder / f"tiny-{kind}", kind)
    make_scorer(folder / "tiny-clip")
    make_pairs(folder / "pairs.parquet")
    print(f"wrote {folder}/tiny-sd15, tiny-sdxl, tiny-sd35, tiny-clip and pairs.parquet\n"
          f"next: python diffusion_dpo.py --model {folder}/tiny-sdxl --data {folder}/pairs.parquet"
          " \\\n          --resolution 64 --batch 8 --steps 5")


if __name__ == "__main__":
    main()
