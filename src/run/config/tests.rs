use super::*;

fn parsed(text: &str) -> Result<(Experiment, Rounds)> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("loop.toml");
    std::fs::write(&path, text).unwrap();
    read(&path)
}

#[test]
fn the_example_is_read_as_the_defaults() {
    let (experiment, rounds) = parsed(&example()).unwrap();
    let expected = Recipe::try_from(toml::toml! { seed = 1 batch_tokens = 2048 }).unwrap();
    assert_eq!(experiment.repair, expected);
    assert_eq!((experiment.probes, experiment.failures, experiment.seeds), (1000, 240, vec![1]));
    let found =
        Rounds { rounds: 3, method: Method::Joint, held_out: Vec::new(), allow_undecided: false, fail_above: None };
    assert_eq!(rounds, found);
    let command = Keys::command();
    for arg in command.get_arguments() {
        let key = arg.get_long().unwrap().replace('-', "_");
        assert!(SECTIONS.iter().any(|(_, keys)| keys.contains(&key.as_str())), "{key} stands in no section");
    }
}

#[test]
fn what_stands_in_no_place_is_named_with_the_nearest_that_does() {
    let full = example();
    for (from, to, expected) in [
        ("queries = 1000", "querys = 1000", "key querys in [probe]; the nearest is queries"),
        ("[gates]", "[gate]", "section [gate]; the nearest is gates"),
        ("rounds = 3", "rounds = 3\nqueries = 5", "key queries in [rounds]; it belongs into [probe]"),
        ("steps = 80", "stepz = 80", "key stepz in [repair]; the nearest is steps"),
        ("seed = 1\n", "sed = 1\n", "key sed at the top; the nearest is seed"),
        ("policy = \"policy\"", "", "policy <DIR[+ADAPTER]>"),
        ("method = \"joint\"", "method = \"jointly\"", "where one of sham, sft, dpo, policy"),
        ("judge = \"model:judge\"", "judge = \"oracle:x\"", "for 'judge <SPEC>'"),
        ("further_under = \"own\"", "further_under = \"mine\"", "for 'further_under <"),
        ("queries = 1000", "queries = [[1]", "TOML parse error"),
    ] {
        assert!(full.contains(from), "{from}");
        let error = parsed(&full.replacen(from, to, 1)).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("loop.toml"), "{to}: {error}");
    }
}

/// Every number of a configuration but a recipe's, at values that cannot be meant: refused by name with its range, or right.
#[test]
fn every_number_lies_in_its_range() {
    let (full, command) = (example(), Keys::command());
    let mut accepted = Vec::new();
    for key in SECTIONS.iter().flat_map(|(_, keys)| *keys).filter(|key| takes_numbers(argument(&command, key).unwrap()))
    {
        let begins = |line: &&str| line.trim_start_matches("# ").starts_with(&format!("{key} = "));
        let line = full.lines().find(begins).unwrap();
        for value in ["nan", "inf", "-1", "0", "1e308", "1.5", "\"1\"", "true", "[]", "[[1]]"] {
            match parsed(&full.replacen(line, &format!("{key} = {value}"), 1)) {
                Ok(_) => accepted.push(format!("{key} = {value}")),
                Err(error) => {
                    let error = error.to_string();
                    let named = error.contains(&format!("'{key} <"));
                    assert!(
                        named && ["from 0 to", "from 1 to", "from 1e-9 to"].iter().any(|range| error.contains(range)),
                        "{value}: {error}"
                    );
                }
            }
        }
    }
    let expected = "seed = 0, harm_threshold = 0, prefill = 0, fail_above = 0, seeds = 0, seeds = [], grid = [], samples = 0, further = 0";
    assert_eq!(accepted.join(", "), expected);
}

#[test]
fn text_is_text() {
    let full = example();
    for (from, to) in [
        ("policy = \"policy\"", "policy = 5"),
        ("gate = \"gate.jsonl\"", "gate = [\"gate.jsonl\"]"),
        ("approve = \"threshold\"", "approve = true"),
        ("held_out = []", "held_out = [1]"),
    ] {
        assert!(full.contains(from), "{from}");
        let error = parsed(&full.replacen(from, to, 1)).unwrap_err().to_string();
        assert!(error.contains("where text is expected") && error.contains(to.split(' ').next().unwrap()), "{error}");
    }
}
