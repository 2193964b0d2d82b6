"""Export the samples that look mislabelled, the most surprising first: `python export_suspects.py RUN suspects.csv`."""

# %% What looks mislabelled has a high loss; its ADM is low, which says nothing of the label.
import math
import sys

from steppe import open_run

folder, out = sys.argv[1:]
run = open_run(folder)
table = run.to_pandas(measures=("loss", "adm"))
scored = table[table["loss"].notna()]

# %% Less likely than chance, ln K: the network, having seen everything else, does not believe these labels.
chance = math.log(scored["label"].nunique())
suspects = scored[scored["loss"] > chance].sort_values("loss", ascending=False)
suspects[["key", "label", "predicted", "loss", "adm", "model_version"]].to_csv(out)
print(f"{len(suspects)} of {len(scored)} scored samples are suspects; wrote {out}")
