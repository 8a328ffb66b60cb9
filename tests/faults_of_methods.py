"""Deliberate faults in what the methods share, see `faults.py`."""

from faults import Mutant

FAULTS_D = [
    # ------------------------------------------------------------------------- the comparison of methods, its passages
    Mutant(
        "passages are about two people, whatever is asked", "data/synthetic.py",
        "_draw(rng, FACTS, people, fewest", "_draw(rng, FACTS, 2, fewest", "test_synthetic.py -k more_people",
    ),
    Mutant(
        "people share values in the count of passages", "data/synthetic.py",
        "math.perm(len(values), stated.count(kind))", "len(values) ** stated.count(kind)", "test_synthetic.py -k bits",
    ),
    Mutant(
        "seeds count as new passages", "../launch/experiments/methods_table.py",
        "np.tile(passages, len(seeds))", "np.arange(len(vectors))", "test_methods_experiment.py -k same_passages",
    ),
    Mutant(
        "EM is divided by F1", "../launch/experiments/methods_table.py",
        "np.concatenate(of_seeds)[:, columns]", "np.concatenate(of_seeds)", "test_methods_experiment.py -k same_passages",
    ),
    Mutant(
        "every rate trains alike", "../launch/experiments/methods.py",
        "rate * decay(number, steps)", "decay(number, steps)", "test_methods_experiment.py -k every_rate",
    ),
    Mutant(
        "another passage's memory is the passage's own", "../launch/experiments/methods.py",
        "memory[np.roll(np.arange(len(rows)), -1)]", "memory[np.arange(len(rows))]",
        "test_methods_experiment.py -k scores_of_every",
    ),
]  # fmt: skip
