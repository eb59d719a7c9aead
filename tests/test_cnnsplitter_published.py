"CNNSplitter's published numbers: what a row has to be made with, the studies that make it, and their caveats."

from pathlib import Path

import pytest

from modnb.cnnsplitter.search import published_rules
from modnb.cnnsplitter.sensitivity import PUBLISHED
from modnb.lab.matrix import read_matrix, study_cells
from modnb.lab.published import read_published, recipe, what_differs
from modnb.lab.running import notebook_parameters

EXPERIMENTS = Path(__file__).parents[1] / "nbs/experiments"


def searched(network):
    "Settings of a search as its rows record them, with the program's choices for a network"
    rules, joined = published_rules(network), lambda shares: ",".join(f"{share:g}" for share in shares)
    return {
        "sensitive_layers": joined(PUBLISHED[network]["sensitive"]), "keep_sensitive": joined(rules.keep_sensitive),
        "keep_insensitive": joined(rules.keep_insensitive), "mutation_rate": rules.mutation_rate,
        "population": rules.individuals, "accuracy_goal": rules.accuracy_goal,
        "combination_thresholds": ",".join(f"{size}:{share:g}" for size, share in rules.thresholds)}


def published(network):
    "A published number about modules of a network, the settings of its recipe, and what a row is about"
    model, dataset = network.split("-")
    five = dataset == "svhn5"
    table, metric = ("cnnsplitter_table4", "patched_precision") if five else ("cnnsplitter_table1", "difference")
    about = {"model": model, "dataset": dataset.removesuffix("5"), "metric": metric, "target": "0" if five else ""}
    number = next(n for n in read_published(table).to_dict("records") if about.items() <= n.items())
    config = {name: accepted[0] for name, accepted in recipe(number).items()}
    return number, config, {"model": model, "dataset": about["dataset"], "hardware": "any"}


def differing(*asked): return {text.split()[0] for text in what_differs(*asked)}


@pytest.mark.parametrize("network", PUBLISHED)
def test_recipes_of_searches_are_the_programs_choices(network):
    "A search is like for like with the choices of its own network, and with those of no other"
    number, config, row = published(network)
    assert searched(network).items() <= config.items()
    for other in PUBLISHED:
        changed = {name for name, value in searched(other).items() if value != searched(network)[name]}
        assert differing(number, row, config | searched(other)) == changed, other
        assert changed or other == network


@pytest.mark.parametrize("change", [
    {"rules": "paper"}, {"elites": 0}, {"parents": 10}, {"fewest": 100}, {"most": 100}, {"generations": 10},
    {"initial_bias": 0.0}, {"accuracy_weight": 0.5}, {"grouping": "none"}, {"start": "random"}, {"min_confidence": 0.0},
    {"search_images": 1000}, {"relative_goals": True}, {"importance_images": 10_000}, {"fewest_sure": 50},
    {"search_precision": "bfloat16"}, {"keep": "last"}, {"nesterov": True}, {"normalisation": ""}, {"valid": 0.1}],
    ids=str)
def test_another_search_or_training_is_not_compared(change):
    number, config, row = published("simcnn-cifar10")
    assert differing(number, row, config) == set() and differing(number, row, config | change) == {*change}


def test_dropout_of_the_program():
    for network, value in (("simcnn-cifar10", None), ("rescnn-cifar10", 0.4), ("rescnn-svhn", 0.4)):
        number, config, row = published(network)
        assert config["dropout"] == value and differing(number, row, config | {"dropout": 0.1}) == {"dropout"}


def test_patches_have_simple_networks_of_the_program():
    number, config, row = published("rescnn-svhn5")
    assert config["simple_form"] == "released"
    assert differing(number, row, config | {"simple_form": "paper"}) == {"simple_form"}


@pytest.mark.parametrize("study, table, metric", [
    ("cnnsplitter_networks", "cnnsplitter_table1", "accuracy"), ("cnnsplitter_networks", "mwt_table3", "accuracy"),
    ("cnnsplitter_five_classes", "cnnsplitter_table4", "patched_precision")])
def test_studies_of_searches_train_by_the_recipe(study, table, metric):
    "Every published network has its cells, and their training differs in nothing that the recipe asks for"
    defaults, matrix = notebook_parameters(EXPERIMENTS / "train.ipynb"), read_matrix(EXPERIMENTS / "matrix.yaml")
    knobs = [defaults | cell.train for cell in study_cells(matrix, study, defaults)]
    numbers = read_published(table).query("metric == @metric and model != 'average' and system != 'mwt'")
    numbers = numbers[numbers.target != "average"].to_dict("records")
    assert numbers
    for number in numbers:
        row = {"model": number["model"], "dataset": number["dataset"], "hardware": "any"}
        same = [one for one in knobs if (one["model"], one["dataset"]) == (row["model"], row["dataset"])]
        assert len(same) == 3, "seeds"
        for one in same:
            found = [text for text in what_differs(number, row, one) if " instead of " in text]
            assert [text for text in found if text.split()[0] in defaults] == [], "others: of search and patch"


def test_each_published_search_has_its_study():
    "As its notebook names the network, with the program's choices for it"
    defaults, matrix = notebook_parameters(EXPERIMENTS / "train.ipynb"), read_matrix(EXPERIMENTS / "matrix.yaml")
    found = set()
    for study in ("cnnsplitter_networks", "cnnsplitter_five_classes"):
        for cell in study_cells(matrix, study, defaults):
            search = cell.stages["cnnsplitter_search"]
            assert (search["rules"], search["configuration"]) == ("released", "published")
            found.add(f"{cell.train['model']}-{cell.train['dataset']}" + "5" * ("only_classes" in cell.train))
    assert found == {*PUBLISHED}


def test_the_ablation_has_its_searches():
    "CNNSplitter's Table 7 has four lines for each network: each is a stage"
    defaults, matrix = notebook_parameters(EXPERIMENTS / "train.ipynb"), read_matrix(EXPERIMENTS / "matrix.yaml")
    lines = {number["details"] for number in read_published("cnnsplitter_table7").to_dict("records")}
    for cell in study_cells(matrix, "cnnsplitter_networks", defaults):
        usual = {"grouping": "importance", "start": "sensitivity"}
        stages = [usual | settings for stage, settings in cell.stages.items() if stage.startswith("cnnsplitter_search")]
        assert {f'{{"grouping": "{s["grouping"]}", "start": "{s["start"]}"}}' for s in stages} == lines
        assert len(stages) == len(lines) == 4


def test_the_figure_has_its_searches():
    "Figure 7 varies the weight of accuracy and the population, one at a time"
    defaults, matrix = notebook_parameters(EXPERIMENTS / "train.ipynb"), read_matrix(EXPERIMENTS / "matrix.yaml")
    assert matrix["cnnsplitter_parameters"]["fills"] == ["cnnsplitter_figure7"]
    (cell,) = study_cells(matrix, "cnnsplitter_parameters", defaults)
    weights = [stage["accuracy_weight"] for stage in cell.stages.values() if "accuracy_weight" in stage]
    sizes = [stage["population"] for stage in cell.stages.values() if "population" in stage]
    assert len({*weights}) > 2 and len({*sizes}) > 2 and len(weights) + len(sizes) + 1 == len(cell.stages)


def test_caveats_about_simple_networks():
    cifar, svhn = "four convolutions on CIFAR", "8 kernels 5x5"
    for table, forms in (("cnnsplitter_table3", [cifar]), ("cnnsplitter_table4", [svhn]),
                         ("cnnsplitter_table5", [cifar, svhn])):
        numbers = read_published(table)
        for form in (cifar, svhn):
            hits = numbers[numbers.caveat.str.contains(form, regex=False)]
            assert bool(len(hits)) is (form in forms), (table, form)
            assert hits.details.str.contains('"weak": "simple"', regex=False).all()
            assert set(hits.dataset) <= {"svhn" if "5x5" in form else "cifar10"}
