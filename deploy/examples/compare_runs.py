"""Do two runs find the same samples difficult? `python compare_runs.py RUN_A RUN_B`."""

# %% Both are of the same samples, or there is nothing to compare.
import sys

from scipy.stats import spearmanr

from steppe import open_run

a, b = (open_run(folder) for folder in sys.argv[1:3])
if a.run.description["dataset_fingerprint"] != b.run.description["dataset_fingerprint"]:
    sys.exit(f"{a.path} and {b.path} are of different data sets")

# %% Rank correlation of each measure over the samples that both have scored.
left, right = (run.to_pandas(measures=("adm", "loss")) for run in (a, b))
both = left["model_version"].notna() & right["model_version"].notna()
print(f"{both.sum()} of {len(both)} samples are scored in both")
for measure in ("adm", "loss", "grad_norm"):
    agreement = spearmanr(left.loc[both, measure], right.loc[both, measure]).statistic
    print(f"{measure:<10} rank correlation {agreement:.3f}")

# %% Where they disagree most.
gap = left.loc[both, "adm"].rank(pct=True) - right.loc[both, "adm"].rank(pct=True)
for i in gap.abs().nlargest(5).index:
    print(f"sample {i} ({left.loc[i, 'key']}): ADM rank {gap[i]:+.2f} higher in {a.path.name}")
