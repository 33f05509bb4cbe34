"""A tiny Stable Diffusion that draws faces, with pairs of its faces to train it on.

    python toy/faces.py               # makes toy/tiny-faces, once; under ten minutes
    python toy/faces.py look RUN      # what a training has changed: numbers, a sheet and a film

In place of these labels, toy/label.py lets you choose the better faces yourself.

The model knows 12 captions, such as "a red face on a blue ground". Its parts and files are those of
SD1.5. First a VAE is trained on drawings. Then a UNet is trained on its latents, together with the
text encoder, which SD1.5 takes ready-made from CLIP. No caption says whether a face smiles, so the
model draws every mouth from sad to happy.

The pairs are samples of the model, with the columns of Pick-a-Pic. The last HELD_OUT of them are
not for training. What is preferred is the **smile**, which smile_of() measures. What should not
suffer is the **quality**, which truth() measures. A label is random: it follows Bradley-Terry with
the reward REWARD * smile.

The folder also holds prompts.txt, the 12 captions, and clip/, a scorer for toy/judge.py. The scorer
was trained on preferences, as PickScore was, and it errs. Nothing is downloaded.
"""

import argparse
import functools
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
from PIL import Image, ImageDraw
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]
import diffusion_dpo as dpo
from toy import figure, judge, make_tiny

SIDE = 32  # pixels
HELD_OUT = 200  # pairs
REWARD = 3.0  # nats of reward from a straight mouth to the widest smile
HAPPY = 0.3  # a face with more smile than this counts as happy
INK = (40, 34, 44)  # of eyes and mouth
PAINT = {"red": (240, 108, 96), "green": (122, 200, 112), "blue": (112, 162, 240),
         "yellow": (250, 208, 80)}
COLOURS = list(itertools.permutations(PAINT, 2))  # of the face, of the ground
CAPTIONS = [f"a {face} face on a {ground} ground" for face, ground in COLOURS]
SAMPLING = {"num_inference_steps": 25, "guidance_scale": 1.0}  # the network alone, no guidance
# How many drawings of each caption, training steps and pairs. The tests have smaller numbers.
SIZES = {"drawings": 200, "vae_steps": 1600, "unet_steps": 2000, "clip_steps": 200, "pairs": 1000}

UNET = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1,
        "norm_num_groups": 8, "attention_head_dim": 4, "cross_attention_dim": 64,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2}
VAE = {"sample_size": SIDE, "block_out_channels": (16, 32, 32), "norm_num_groups": 8,
       "down_block_types": ("DownEncoderBlock2D",) * 3,
       "up_block_types": ("UpDecoderBlock2D",) * 3}
WORDS = [*PAINT, "face", "on", "ground"]  # a token each; other words are spelt
TEXT = make_tiny.TINY_CLIP | {"hidden_size": 64, "intermediate_size": 256,
                              "vocab_size": make_tiny.TINY_CLIP["vocab_size"] + len(WORDS)}


# ------------------------------------------------------------- drawings, their smile and quality

def draw_face(rng, colours, smile):
    """A drawing (PIL, SIDE x SIDE) of a face, whose place and size vary.

    The mouth is a parabola. Its curvature is `smile`, from -1 (sad) over 0 (straight) to 1 (happy).
    """
    face, ground = (PAINT[name] for name in colours)
    ground = tuple((value + 2 * 255) // 3 for value in ground)  # paler than any face
    image = Image.new("RGB", (3 * SIDE, 3 * SIDE), ground)  # scaled down below: smooth edges
    pen = ImageDraw.Draw(image)

    x, y = (1.5 * SIDE + rng.uniform(-4, 4) for _ in range(2))
    r = rng.uniform(1.13, 1.34) * SIDE
    pen.ellipse((x - r, y - r, x + r, y + r), face)
    for eye in (x - 0.38 * r, x + 0.38 * r):
        size = 0.12 * r
        pen.ellipse((eye - size, y - 0.3 * r - size, eye + size, y - 0.3 * r + size), INK)

    width = rng.uniform(0.5, 0.6) * r  # from the middle to a corner
    mouth = [(x + width * u, y + 0.42 * r + 0.3 * r * smile * (0.5 - u * u))
             for u in torch.linspace(-1, 1, 21).tolist()]
    pen.line(mouth, INK, 7, joint="curve")
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


@functools.cache
def drawings(n, seed):
    """n drawings of each caption: pixels (12, n, 3, SIDE, SIDE) uint8, and their smiles (12, n)."""
    rng = random.Random(seed)
    smiles = [[rng.uniform(-1, 1) for _ in range(n)] for _ in CAPTIONS]
    images = [dpo.crop_square(draw_face(rng, colours, smile), SIDE, 0.5, 0.5, False)
              for colours, row in zip(COLOURS, smiles, strict=True) for smile in row]
    return torch.stack(images).unflatten(0, (len(CAPTIONS), n)), torch.tensor(smiles)


def smile_of(images):
    """The smiles (N,) of images (N, 3, SIDE, SIDE) uint8: how much a mouth curves, in -1.5 .. 1.5.

    It inverts draw_face(). The eyes are the ink in the upper half of an image. Their distance gives
    the face's radius. The mouth is the ink in the lower half. A parabola is fitted to it, by least
    squares. On drawings the error of the smile is 0.06 (root mean square).
    """
    brightest = images.float().amax(1)  # (N, SIDE, SIDE), of red, green and blue
    ink = ((150 - brightest) / 90).clamp(0, 1)  # 1 is ink, 0 is paint
    eyes, mouth = ink.flatten(1).chunk(2, 1)  # (N, SIDE * SIDE / 2) each
    y, x = torch.cartesian_prod(torch.arange(SIDE / 2), torch.arange(float(SIDE))).T

    def from_middle(ink):
        """x less its mean over the ink (N, SIDE * SIDE / 2), and the variance of x (N,)."""
        share = ink / ink.sum(1, keepdim=True).clamp(min=1)
        offset = x - (share * x).sum(1, keepdim=True)
        return offset, (share * offset.square()).sum(1)

    _, variance = from_middle(eyes)
    radius = variance.sqrt().clamp(min=1) / 0.38  # the eyes are 0.38 radii from the middle
    offset, variance = from_middle(mouth)
    width_squared = 3 * variance  # u is uniform in -1 .. 1, so the mean of u * u is 1/3

    # Fit y = a + b x + c x^2, where a pixel counts as much as it has ink.
    terms = torch.stack([torch.ones_like(offset), offset, offset.square()], 2)
    weight = mouth.sqrt()[..., None]  # a root, because it is squared with the rest
    fit = torch.linalg.lstsq(weight * terms, weight * y[:, None])
    curvature = -fit.solution[:, 2, 0]  # minus, because y points down
    return (curvature * width_squared / (0.3 * radius)).clamp(-1.5, 1.5)


def truth(images, captions):
    """What is true of images (N, 3, SIDE, SIDE) uint8 and their N captions: {name: (N,)}.

    smile    smile_of(images)
    happy    1 if the smile is more than HAPPY, else 0
    quality  minus the distance to the nearest of 600 drawings of its caption; 0 is perfect
    match    1 if the nearest drawing of all captions is of its own caption, else 0

    The model was not trained on these drawings. The distance of two images is the root of the mean
    squared difference of their pixels, which are in 0 .. 1.
    """
    smile = smile_of(images)
    pixels = images.flatten(1) / 255
    right, _ = drawings(600, "truth")  # (12, 600, 3, SIDE, SIDE)
    nearest = [torch.cdist(pixels, each.flatten(1) / 255).amin(1) for each in right]
    nearest = torch.stack(nearest, 1) / pixels.shape[1] ** 0.5  # (N, 12)
    own = torch.tensor([CAPTIONS.index(caption) for caption in captions])  # (N,)
    return {"smile": smile,
            "happy": (smile > HAPPY).float(),
            "quality": -nearest.gather(1, own[:, None])[:, 0],
            "match": (nearest.argmin(1) == own).float()}


# ---------------------------------------------------------------------------- the trained models

def fit(name, modules, loss_of, steps, lr):
    """Train modules on loss_of(), a scalar, by AdamW. The rate rises briefly, and falls to 0."""
    parameters = [p for module in modules for p in module.train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    bar = tqdm(range(steps), f"{name:8}", ncols=99, unit=" steps")
    for step in bar:
        rising, falling = min(1, (step + 1) / 20), 1 - step / steps
        optimizer.param_groups[0]["lr"] = lr * rising * falling
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
    for module in modules:
        module.eval()


def train_vae(vae, images, steps):
    """Train on images (M, 3, SIDE, SIDE) in -1 .. 1. Returns their latents, of variance 1."""
    def loss_of():
        x = images[torch.randint(len(images), (16,))]
        posterior = vae.encode(x).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, x)
        return error + 1e-6 * posterior.kl().mean()

    fit("vae", [vae], loss_of, steps, lr=4e-3)
    with torch.no_grad():
        latents = [vae.encode(part).latent_dist.mode() for part in images.split(256)]
    latents = torch.cat(latents)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return latents * vae.config.scaling_factor  # (M, 4, SIDE / 4, SIDE / 4)


def train_unet(pipe, latents, steps):
    """Train UNet and text encoder on latents (12, n, 4, ...). One caption in ten is left empty."""
    texts = pipe.tokenizer([*CAPTIONS, ""], padding="max_length", return_tensors="pt")

    def loss_of():
        caption = torch.randint(len(CAPTIONS), (32,))
        t = torch.randint(1000, (32,))
        x_0 = latents[caption, torch.randint(latents.shape[1], (32,))]
        eps = torch.randn_like(x_0)
        caption = caption.where(torch.rand(32) > 0.1, len(CAPTIONS))  # else the empty one
        prompt = pipe.text_encoder(texts.input_ids)[0][caption]
        x_t = pipe.scheduler.add_noise(x_0, eps, t)
        return F.mse_loss(pipe.unet(x_t, t, prompt).sample, eps)

    fit("unet", [pipe.unet, pipe.text_encoder], loss_of, steps, lr=2e-3)


def train_clip(folder, images, smiles, steps):
    """Write a CLIPModel and its processor to `folder`: a scorer that is trained as PickScore is.

    The images (12, n, 3, ...) are drawings of each caption, and the smiles (12, n) are theirs. Of
    two drawings of a caption, the happier one should match the text better. The training is short,
    so the scorer errs.
    """
    make_tiny.make_scorer(folder)
    model = transformers.CLIPModel.from_pretrained(folder)
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=CAPTIONS, images=[*images.flatten(0, 1)], padding=True,
                       return_tensors="pt")
    pixels = inputs.pop("pixel_values").unflatten(0, images.shape[:2])  # (12, n, 3, 32, 32)
    caption = torch.arange(len(CAPTIONS))

    def loss_of():
        number = torch.randint(images.shape[1], (2, len(CAPTIONS)))  # two drawings of each caption
        happier = smiles[caption, number].argmax(0)  # (12,): 0 for the first one, 1 for the second
        out = model(**inputs, pixel_values=pixels[caption, number].flatten(0, 1))
        score = out.logits_per_image.unflatten(0, (2, -1))[:, caption, caption]  # (2, 12)
        return F.cross_entropy(score.T, happier)

    fit("clip", [model], loss_of, steps, lr=1e-3)
    model.save_pretrained(folder)


# ------------------------------------------------------------------------------ samples and pairs

@torch.no_grad()
def sample(pipe, jobs, key):
    """Images (N, 3, SIDE, SIDE) uint8 for jobs (caption, number).

    The noise of a job follows from job and key, whichever model draws it.
    """
    pipe.set_progress_bar_config(disable=True)
    images = []
    for first in tqdm(range(0, len(jobs), 64), "draw    ", ncols=99, unit=" batches"):
        part = jobs[first:first + 64]
        gens = [dpo.seeded_generator(key, *job) for job in part]
        noise = torch.stack([torch.randn(4, SIDE // 4, SIDE // 4, generator=gen) for gen in gens])
        out = pipe([caption for caption, _ in part], height=SIDE, width=SIDE, generator=gens,
                   latents=noise.to(pipe.device), output_type="pt", **SAMPLING).images
        images.append((out * 255).round().to("cpu", torch.uint8))  # they lie in 0 .. 1
    return torch.cat(images)


def bradley_terry(reward_0, reward_1, seed):
    """Random labels (P,) of pairs: 1 with probability sigmoid(reward_0 - reward_1), else 0."""
    chance = torch.rand(len(reward_0), generator=dpo.seeded_generator(seed, "labels"))
    return (chance < torch.sigmoid(reward_0 - reward_1)).float()


def write_pairs(path, captions, images, labels):
    """Write pairs with Pick-a-Pic's columns. P captions; images (P, 2, 3, ...); labels (P,)."""
    rows = []
    for caption, pair in zip(captions, images, strict=True):
        first, second = ({"bytes": to_png(image)} for image in pair)
        rows.append({"prompt": caption, "first": first, "second": second})
    judge.write_pairs(rows, dict(enumerate(labels.tolist())), None, path)


def to_pil(image):
    """An image (3, H, W) uint8 as PIL's."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def to_png(image):
    """An image (3, H, W) uint8 as the bytes of a PNG file."""
    file = io.BytesIO()
    to_pil(image).save(file, "PNG")
    return file.getvalue()


def build(out, seed, sizes):
    """Make the folder: model, pairs.parquet, prompts.txt, clip/. Returns means over the samples."""
    torch.manual_seed(seed)
    pipe = make_tiny.assemble(unet=UNET, vae=VAE, encoders=[TEXT])
    pipe.tokenizer.add_tokens(WORDS)
    pipe.tokenizer.model_max_length = 12  # a caption has 9 tokens
    images, smiles = drawings(sizes["drawings"], seed)
    latents = train_vae(pipe.vae, images.flatten(0, 1) / 127.5 - 1, sizes["vae_steps"])
    train_unet(pipe, latents.unflatten(0, smiles.shape), sizes["unet_steps"])

    n = sizes["pairs"]
    captions = (CAPTIONS * n)[:n]  # in turn
    jobs = [(caption, 2 * i + half) for i, caption in enumerate(captions) for half in (0, 1)]
    samples = sample(pipe, jobs, f"pairs {seed}")
    found = truth(samples, [caption for caption, _ in jobs])
    smile_0, smile_1 = found["smile"].view(n, 2).T
    labels = bradley_terry(REWARD * smile_0, REWARD * smile_1, seed)

    with dpo.atomic_write(out) as folder:
        pipe.save_pretrained(folder)
        train_clip(folder / "clip", images, smiles, sizes["clip_steps"])
        (folder / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n")
        write_pairs(folder / "pairs.parquet", captions, samples.unflatten(0, (n, 2)), labels)
    found["labels_as_the_smiles"] = ((smile_0 > smile_1) == labels.bool()).float()
    return {name: values.mean().item() for name, values in found.items()}


# ------------------------------------------------------------------------------- before and after

def load_run(folder):
    """The policy and the reference of a run on faces, as a task. Raises UserError."""
    if not (folder / "config.json").exists():
        raise dpo.UserError(f"{folder}: it is not the folder of a run")
    # None: the model and the resolution are those of the run, the rest are defaults.
    cfg = judge.settings(argparse.Namespace(
        policy=folder, model=None, resolution=None, precision=None, micro_batch=None))
    device = dpo.start_processes(torch.cuda.is_available())
    task = dpo.StableDiffusion(cfg, device, dpo.load_pipeline(cfg.model))
    if cfg.resolution != SIDE or task.shape != (4, SIDE // 4, SIDE // 4):
        raise dpo.UserError(f"{folder}: it is a run of {cfg.model} at {cfg.resolution} pixels, and"
                            f" not of toy/tiny-faces at {SIDE}")
    dpo.load_weights(task, folder)
    return task


def look(args):
    """Print and draw what a training has changed. Both sides draw from the same noise."""
    run = Path(args.run_folder)
    to = args.to or run / "look"
    task = load_run(run)
    jobs = [(caption, number) for number in range(args.images) for caption in CAPTIONS]
    pictures, found = [], {}
    for side in judge.SIDES:
        with figure.network_of(task, side):
            images = sample(task.pipe, jobs, "look")
        found[side] = truth(images, [caption for caption, _ in jobs])
        pictures += [to_pil(image) for image in images[:len(CAPTIONS)]]

    numbers = {"images": len(jobs)}
    print(f"\n{'':12}{'reference':>12}{'policy':>12}{'difference':>14}{'(standard error)':>18}")
    for name in found["policy"]:
        reference, policy = (found[side][name] for side in judge.SIDES)  # (N,) each
        difference = policy - reference
        error = (difference.std() / len(jobs) ** 0.5).item()
        print(f"{name:12}{reference.mean():12.3f}{policy.mean():12.3f}"
              f"{difference.mean():+14.3f}{error:18.3f}")
        numbers[f"{name}_reference"] = reference.mean().item()
        numbers[f"{name}_policy"] = policy.mean().item()
        numbers[f"{name}_standard_error"] = error  # of their difference

    dpo.write_json(Path(f"{to}.json"), numbers)
    enlarge(pictures, len(CAPTIONS)).save(f"{to}.png")
    print(f"numbers     {to}.json\nsheet       {to}.png, the reference above the policy")

    files = sorted(run.glob("samples/step-*.png"))
    if files:
        draw_film(files, f"{to}.gif")
        print(f"film        {to}.gif")


def enlarge(images, columns):
    """A grid (PIL) of small images (PIL), each four times as large, with `columns` in a row."""
    size = 4 * SIDE, 4 * SIDE
    large = [image.resize(size, Image.Resampling.BICUBIC) for image in images]
    return diffusers.utils.make_image_grid(large, len(large) // columns, columns)


def draw_film(files, path):
    """Write a GIF of the pictures that a run has saved: first the reference, then the policies.

    On each picture, the left column is of the reference, and the right one of the policy.
    """
    def frame(file, x):
        sheet = Image.open(file)
        faces = [sheet.crop((x, y, x + SIDE, y + SIDE)) for y in range(0, sheet.height, SIDE)]
        rows = 1 if len(faces) % 2 else 2
        grid = enlarge(faces, len(faces) // rows)
        return grid.quantize(32, dither=Image.Dither.NONE)  # few colours make a small file

    reference = frame(files[0], 0)
    policies = [frame(file, SIDE) for file in files]
    pauses = [1500, *[400] * (len(files) - 1), 3000]  # milliseconds
    reference.save(path, save_all=True, append_images=policies, loop=0, duration=pauses)


# ----------------------------------------------------------------------------------- command line

NEXT = """to choose the better faces yourself: python toy/label.py --model {out} --out my-taste
next: python diffusion_dpo.py --model {out} --data {out}/pairs.parquet \\
          --split 'train[:-{held_out}]' --eval-split 'train[-{held_out}:]' --eval-every 100 \\
          --resolution 32 --beta 500 --lr 3e-5 --batch 32 --micro-batch 32 --steps 300 \\
          --sample-every 30 --guidance 1 --out runs/faces
      python toy/faces.py look runs/faces"""


def make(args):
    """Make the folder, unless it is there, and say what to run next."""
    out = Path(args.out)
    if not out.exists():
        numbers = build(out, args.seed, SIZES)
        print("".join(f"\n    {name:26}{value:.3f}" for name, value in numbers.items()))
    elif not (out / "pairs.parquet").exists():
        raise dpo.UserError(f"--out {out}: it exists, and it holds no faces; name a new folder")
    else:
        print(f"{out} is there already. To make it anew, remove it.")
    print(NEXT.format(out=out, held_out=HELD_OUT))


def parse(argv=None):
    """The command line as a namespace. Raises UserError."""
    parser = judge.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.set_defaults(run=make)
    default = os.path.relpath(HERE / "tiny-faces")
    parser.add_argument("--out", default=default, help=f"folder to make [{default}]")
    parser.add_argument("--seed", type=judge.at_least(0, int), default=0,
                        help="of drawings, weights and labels [0]")
    commands = parser.add_subparsers(metavar="{look}")
    one = commands.add_parser("look", help="reference and policy of a run, compared")
    one.set_defaults(run=look)
    one.add_argument("run_folder", metavar="RUN", help="folder of a run of diffusion_dpo.py")
    one.add_argument("--images", type=judge.at_least(1, int), default=20,
                     help="images per caption [20]")
    one.add_argument("--to", help="path of what it writes, without .png, .json, .gif [RUN/look]")
    return parser.parse_args(argv)


def main(argv=None):
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    dpo.run_command(main)
