"""Make the README's toy tables: every setting with three seeds, by the command line itself.

    python toy/table.py        # toy/table.json, toy/toy.png, Markdown tables; about 35 minutes
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
TABLES = (  # names in results.json; setting: the flags after --toy
    (("tv_reference", "tv_policy", "tv_floor", "reward_policy", "reward_optimum",
      "entropy_policy", "entropy_optimum"),
     {"DPO": "", "SEE-DPO": "--gamma 0.5",
      "DPO, one draw": "--draws 1 --batch 2048",  # as many network calls as 64 draws of 32 pairs
      "SFT": "--method sft"}),
    (("held_out_accuracy", "held_out_standard_error", "held_out_accuracy_of_true_reward",
      "held_out_kendall_tau", "held_out_margin", "held_out_rise_w", "held_out_rise_l"),
     {"DPO": "", "SEE-DPO": "--gamma 0.5", "SFT": "--method sft"}),
    (("reward_reference", "reward_policy", "reward_optimum", "proxy_reference", "proxy_policy",
      "held_out_kendall_tau"),
     {"beta 2": "--label-with proxy --beta 2", "beta 0.5": "--label-with proxy",
      "beta 0.25": "--label-with proxy --beta 0.25"}),
)


def run(flags, seed):
    """results.json of one run, made unless it is there already."""
    out = HERE.parent / "runs" / "table" / f"{flags.replace(' ', '')}-{seed}"
    if not (out / "results.json").exists():
        argv = ["--toy", *flags.split(), "--seed", str(seed), "--out", str(out)]
        subprocess.run([sys.executable, str(HERE.parent / "diffusion_dpo.py"), *argv], check=True)
    return json.loads((out / "results.json").read_text()), out / "toy.png"


def cell(values):
    """The median, and the range over the seeds where there is one."""
    low, high = min(values), max(values)
    spread = f" ({low:.3f} to {high:.3f})" if high - low > 5e-4 else ""
    return f"{median(values):.3f}{spread}"


def main():
    results, lines = {}, []
    for columns, settings in TABLES:
        lines += ["| setting | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, flags in settings.items():
            runs = [run(flags, seed) for seed in SEEDS]
            command = ("--toy " + flags).strip()
            results[command] = [numbers for numbers, _ in runs]
            if not flags:
                shutil.copy(runs[0][1], HERE / "toy.png")
            cells = [cell([numbers[column] for numbers in results[command]]) for column in columns]
            lines.append(f"| {name}: `{command}` | " + " | ".join(cells) + " |")
        lines.append("")
    (HERE / "table.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
