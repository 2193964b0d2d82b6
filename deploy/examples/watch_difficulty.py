"""Watch how difficult some samples are while a training goes on: `python watch_difficulty.py RUN 3 14 159`."""

# %% Open the run; it may be up, or over long ago.
import sys

from steppe import open_run

folder, *ids = sys.argv[1:]
samples = [int(i) for i in ids] or [0, 1, 2]
run = open_run(folder)

# %% How ADM and loss of each went, checkpoint by checkpoint, as far as rows are kept.
for i in samples:
    history = run.history(i).to_pandas()
    print(f"sample {i}")
    print(history[["model_version", "step", "adm", "loss", "correct"]].tail(8).to_string(index=False))

# %% And now, beside all others. Ranks of different checkpoints do not mix: rank within each.
run.refresh()
table = run.to_pandas(measures=("adm", "loss"))
table["rank"] = table.groupby("model_version")["adm"].rank(pct=True)
print(table.loc[samples, ["key", "label", "adm", "rank", "loss", "model_version"]].to_string())
