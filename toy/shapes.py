"""A tiny Stable Diffusion that can draw, pairs of its own drawings, and what a training changes.

    python toy/shapes.py               # makes toy/tiny-shapes, once; a quarter of an hour
    python toy/shapes.py look RUN      # what a training has changed; RUN/look.png, RUN/look.json
    python toy/shapes.py study         # the papers' experiments on it, over three seeds

It knows 36 captions, "a red circle on a blue ground" and the like, and is made as the published
models are: a VAE on drawings of 32 x 32 pixels, a UNet and a text encoder on its latents, in
diffusers' layout. What it draws is often a wrong shape, torn, or of a muddy colour. Its own samples
are the pairs, with the columns of Pick-a-Pic; the last HELD_OUT of them are not for training.

The **true reward** that labels them is known exactly, and the eye sees it: minus SCALE times the
distance to the nearest right drawing. Right are DRAWINGS drawings of the caption, by a program, of
all places and sizes; the distance is the root of the mean squared difference of the pixels, which
lie in 0 .. 1. Labels are drawn by chance, by Bradley-Terry. An image *matches* its caption if the
nearest of all the drawings, of all captions, is one of its own.

In the folder, too: clip/, a CLIPModel trained on the same drawings, a scorer for toy/judge.py that
errs; and prompts.txt, the 36 captions. Nothing is downloaded.
"""

import argparse
import io
import itertools
import os
import random
import sys
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]
import diffusion_dpo as dpo
from toy import figure, judge, make_tiny

SIDE = 32  # pixels
SCALE = 100.0  # of the true reward: a nat per hundredth of distance
DRAWINGS = 300  # right drawings per caption
HELD_OUT = 200  # pairs
CLASSES = [(shape, colour, ground) for colour, shape, ground in itertools.product(
    make_tiny.COLOURS, make_tiny.SHAPES, make_tiny.COLOURS) if colour != ground]
CAPTIONS = [f"a {colour} {shape} on a {ground} ground" for shape, colour, ground in CLASSES]
SAMPLING = {"num_inference_steps": 25, "guidance_scale": 1.0}  # the network alone, no guidance
# How long is trained, on how many; the tests have smaller numbers.
SIZES = {"drawings": 100, "vae_steps": 400, "unet_steps": 1200, "clip_steps": 200, "pairs": 1640}

UNET = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1,
        "norm_num_groups": 8, "attention_head_dim": 4, "cross_attention_dim": 64,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2}
VAE = {"sample_size": SIDE, "block_out_channels": (16, 32, 32), "norm_num_groups": 8,
       "down_block_types": ("DownEncoderBlock2D",) * 3,
       "up_block_types": ("UpDecoderBlock2D",) * 3}
WORDS = [*make_tiny.COLOURS, *make_tiny.SHAPES, "on", "ground"]  # tokens; others are spelt
TEXT = make_tiny.TINY_CLIP | {"hidden_size": 64, "intermediate_size": 256,
                              "vocab_size": make_tiny.TINY_CLIP["vocab_size"] + len(WORDS)}


# ------------------------------------------------------------------------ drawings, true reward

def drawings(n, seed):
    """n drawings of each caption, right by construction: (36, n, 3, 32, 32), uint8."""
    rng = random.Random(seed)
    found = []
    for what in CLASSES:
        for _ in range(n):  # large first: scaled down, the edges are smooth
            image = Image.open(io.BytesIO(make_tiny.shape_jpeg(rng, *what, 3 * SIDE)))
            found.append(dpo.crop_square(image, SIDE, 0.5, 0.5, False))
    return torch.stack(found).unflatten(0, (len(CLASSES), n))


class TrueReward:
    """The true reward, and whether an image matches. Its drawings are none of those trained on."""

    def __init__(self):
        self.drawings = drawings(DRAWINGS, "true reward").flatten(2) / 255  # (36, n, 3072)

    def distances(self, images):
        """(N, 36) of images (N, 3, 32, 32), uint8: to the nearest drawing of each caption."""
        pixels = images.flatten(1) / 255  # (N, 3072)
        each = [torch.cdist(pixels, right).min(1).values for right in self.drawings]
        return torch.stack(each, 1) / pixels.shape[1] ** 0.5

    def __call__(self, images, prompts):
        """The reward (N,), and 1 where an image matches, else 0 (N,)."""
        distances = self.distances(images)
        own = torch.tensor([CAPTIONS.index(prompt) for prompt in prompts])
        reward = -SCALE * distances.gather(1, own[:, None])[:, 0]
        return reward, (distances.argmin(1) == own).float()


# ---------------------------------------------------------------------------- the trained models

def fit(name, modules, loss_of, steps, lr):
    """Trains the modules on loss_of(), a scalar, by AdamW at a rate that falls to 0."""
    parameters = [p for module in modules for p in module.train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for step in (bar := tqdm(range(steps), f"{name:8}", ncols=99, unit=" steps")):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
    for module in modules:
        module.eval()


def train_vae(vae, images, steps):
    """images (M, 3, 32, 32) in -1 .. 1. The scaling factor makes the latents' variance 1."""
    def loss_of():
        x = images[torch.randint(len(images), (64,))]
        posterior = vae.encode(x).latent_dist
        return F.mse_loss(vae.decode(posterior.sample()).sample, x) + 1e-6 * posterior.kl().mean()

    fit("vae", [vae], loss_of, steps, lr=2e-3)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(256)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return latents * vae.config.scaling_factor  # (M, 4, 8, 8)


def train_unet(pipe, latents, steps):
    """UNet and text encoder on latents (M, 4, 8, 8), as many of each caption: one caption in ten is
    left empty."""
    ids = pipe.tokenizer([*CAPTIONS, ""], padding="max_length",
                         return_tensors="pt").input_ids  # (37, 12)

    def loss_of():
        row, t = torch.randint(len(latents), (64,)), torch.randint(1000, (64,))
        x_0, eps = latents[row], torch.randn(64, *latents.shape[1:])
        caption = row * len(CAPTIONS) // len(latents)
        caption = caption.where(torch.rand(64) > 0.1, len(CAPTIONS))
        prompt = pipe.text_encoder(ids)[0][caption]  # (64, 12, 64); each text is encoded once
        x_t = pipe.scheduler.add_noise(x_0, eps, t)
        return F.mse_loss(pipe.unet(x_t, t, prompt).sample, eps)

    fit("unet", [pipe.unet, pipe.text_encoder], loss_of, steps, lr=2e-3)


def train_clip(folder, images, steps):
    """Writes a CLIPModel and its processor to `folder`, trained on drawings (36, n, 3, 32, 32)."""
    make_tiny.make_scorer(folder)
    model = transformers.CLIPModel.from_pretrained(folder)
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=CAPTIONS, images=[*images.flatten(0, 1)], padding=True,
                       return_tensors="pt")
    pixels = inputs.pop("pixel_values").unflatten(0, images.shape[:2])  # (36, n, 3, 32, 32)

    def loss_of():  # one drawing of each caption
        number = torch.randint(images.shape[1], (len(CAPTIONS),))
        drawn = pixels[torch.arange(len(CAPTIONS)), number]  # (36, 3, 32, 32)
        return model(**inputs, pixel_values=drawn, return_loss=True).loss

    fit("clip", [model], loss_of, steps, lr=1e-3)
    model.save_pretrained(folder)


# ------------------------------------------------------------------------------ samples and pairs

@torch.no_grad()
def draw(pipe, jobs, key):
    """Images (N, 3, 32, 32), uint8, for jobs (prompt, number): each has noise of its own, which
    follows from job and key, whoever draws."""
    pipe.set_progress_bar_config(disable=True)
    images = []
    for first in tqdm(range(0, len(jobs), 64), f"{'draw':8}", ncols=99, unit=" batches"):
        part = jobs[first:first + 64]
        gens = [dpo.seeded_generator(key, *job) for job in part]
        noise = torch.stack([torch.randn(4, 8, 8, generator=gen) for gen in gens])
        out = pipe([prompt for prompt, _ in part], height=SIDE, width=SIDE, generator=gens,
                   latents=noise.to(pipe.device), output_type="pt", **SAMPLING).images
        images.append((out * 255).round().to("cpu", torch.uint8))  # they lie in 0 .. 1
    return torch.cat(images)


def png(image):
    """The bytes of a PNG of an image (3, 32, 32), uint8."""
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def bradley_terry(reward_0, reward_1, seed):
    """Labels (P,) of pairs with rewards (P,): 1.0, the first is preferred, with probability
    sigmoid(reward_0 - reward_1), else 0.0."""
    chance = torch.rand(len(reward_0), generator=dpo.seeded_generator(seed, "labels"))
    return (chance < torch.sigmoid(reward_0 - reward_1)).float()


def build(out, seed, sizes):
    """Makes the folder: model, pairs.parquet, prompts.txt, clip/. Returns numbers by name."""
    torch.manual_seed(seed)
    pipe = make_tiny.assemble(unet=UNET, vae=VAE, encoders=[TEXT])
    pipe.tokenizer.add_tokens(WORDS)
    pipe.tokenizer.model_max_length = 12  # the longest caption has 9
    images = drawings(sizes["drawings"], seed)  # (36, n, 3, 32, 32)
    latents = train_vae(pipe.vae, images.flatten(0, 1) / 127.5 - 1, sizes["vae_steps"])
    train_unet(pipe, latents, sizes["unet_steps"])
    prompts = [CAPTIONS[i // 2 % len(CAPTIONS)] for i in range(2 * sizes["pairs"])]
    samples = draw(pipe, [(prompt, i) for i, prompt in enumerate(prompts)], f"pairs {seed}")
    reward, match = TrueReward()(samples, prompts)  # (2P,) each
    labels = bradley_terry(reward[::2], reward[1::2], seed)  # (P,)
    table = [{"prompt": prompts[i], "first": {"bytes": png(samples[i])},
              "second": {"bytes": png(samples[i + 1])}} for i in range(0, len(samples), 2)]
    with dpo.atomic_write(out) as folder:
        pipe.save_pretrained(folder)
        train_clip(folder / "clip", images, sizes["clip_steps"])
        (folder / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n")
        judge.write_pairs(table, dict(enumerate(labels.tolist())), None, folder / "pairs.parquet")
    right = (reward[::2] > reward[1::2]) == labels.bool()  # (P,)
    return {"match": match.mean().item(), "reward": reward.mean().item(),
            "accuracy_of_true_reward": right.float().mean().item()}


# ------------------------------------------------------------------------------- before and after

def look(args):
    """Reference and policy draw the same prompts from the same noise; the true reward judges."""
    folder = Path(args.run_folder)
    if not (folder / "config.json").exists():
        raise dpo.UserError(f"{folder}: not the folder of a run")
    more = dict.fromkeys(("model", "resolution", "precision", "micro_batch"))  # the run's own
    cfg = judge.settings(argparse.Namespace(policy=folder, **more))
    device = dpo.start_processes(torch.cuda.is_available())
    task = dpo.StableDiffusion(cfg, device, dpo.load_pipeline(cfg.model))
    if (cfg.resolution, *task.shape) != (SIDE, 4, 8, 8):
        raise dpo.UserError(f"{folder}: of {cfg.model}; it should be a run of toy/tiny-shapes")
    dpo.load_weights(task, folder)
    jobs = [(caption, number) for number in range(args.images) for caption in CAPTIONS]
    images, found, true_reward = {}, {}, TrueReward()
    for side in judge.SIDES:
        with figure.network_of(task, side):
            images[side] = draw(task.pipe, jobs, "look")
        found[side] = true_reward(images[side], [prompt for prompt, _ in jobs])  # (N,), (N,)
    numbers = {"images": len(jobs)}
    print(f"\n{'':12}{'reference':>12}{'policy':>12}{'difference':>14}{'(standard error)':>18}")
    for name, before, after in zip(("reward", "match"), *found.values(), strict=True):
        by = after - before  # (N,)
        error = by.std() / len(by) ** 0.5
        print(f"{name:12}{before.mean():12.3f}{after.mean():12.3f}{by.mean():+14.3f}{error:18.3f}")
        numbers |= {f"{name}_reference": before.mean().item(),
                    f"{name}_policy": after.mean().item(), f"{name}_standard_error": error.item()}
    draw_before_and_after(images, CAPTIONS, folder / "look.png")
    dpo.write_json(folder / "look.json", numbers)
    print(f"figure      {folder}/look.png\nnumbers     {folder}/look.json")


def draw_before_and_after(images, captions, path):
    """An image of each caption, unchosen: reference above policy, from the same noise; 12 in a
    row. images {side: (N, 3, 32, 32)}, uint8."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    blocks = -(-len(captions) // 12)
    sheet, rows = plt.subplots(2 * blocks, 12, figsize=(12, 2.53 * blocks), layout="constrained")
    for number, caption in enumerate(captions):
        block, column = divmod(number, 12)
        for below, side in enumerate(judge.SIDES):
            ax = rows[2 * block + below, column]
            ax.imshow(images[side][number].permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            if column == 0:
                ax.set_ylabel(side)
        rows[2 * block, column].set_title(caption[2:].replace(" on a ", "\non "), fontsize=7)
    with dpo.atomic_write(path) as partial:
        sheet.savefig(partial, dpi=80, format="png")
    plt.close(sheet)


def study(args):
    from toy import shapes_study
    shapes_study.study(Path(args.work))


# ----------------------------------------------------------------------------------- command line

NEXT = """next: python diffusion_dpo.py --model {out} --data {out}/pairs.parquet --resolution 32 \\
          --split 'train[:-{held_out}]' --eval-split 'train[-{held_out}:]' --eval-every 100 \\
          --beta 500 --lr 3e-5 --batch 32 --micro-batch 32 --steps 300 --out runs/shapes
      python toy/shapes.py look runs/shapes"""


def make(args):
    """Makes the folder, unless it is there, and says what to run next."""
    out = Path(args.out)
    if not out.exists():
        numbers = build(out, args.seed, SIZES)
        print("".join(f"\n    {name:26}{value:.3f}" for name, value in numbers.items()))
    elif not (out / "pairs.parquet").exists():
        raise dpo.UserError(f"--out {out}: exists; name a new folder")
    else:
        print(f"{out} is there already; to make it anew, remove it")
    print(NEXT.format(out=out, held_out=HELD_OUT))


def parse(argv=None):
    """The command line as a namespace. Raises UserError."""
    parser = judge.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.set_defaults(run=make)
    default = os.path.relpath(HERE / "tiny-shapes")
    parser.add_argument("--out", default=default, help=f"folder to make [{default}]")
    parser.add_argument("--seed", type=judge.at_least(0, int), default=0,
                        help="of drawings, weights and labels [0]")
    commands = parser.add_subparsers(metavar="{look,study}")
    one = commands.add_parser("look", help="reference and policy of a run, compared")
    one.set_defaults(run=look)
    one.add_argument("run_folder", metavar="RUN", help="folder of a run of diffusion_dpo.py")
    one.add_argument("--images", type=judge.at_least(1, int), default=10,
                     help="images per caption [10]")
    two = commands.add_parser("study", help="the papers' experiments in miniature")
    two.set_defaults(run=study)
    two.add_argument("--work", default="runs/shapes-study", help="folder [runs/shapes-study]")
    args = parser.parse_args(argv)
    if args.run is not make and (args.out, args.seed) != (default, 0):
        raise dpo.UserError("--out and --seed: they go with neither look nor study")
    return args


def main(argv=None):
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    dpo.run_command(main)
