"""mergekit's YAML files as recipes of ours: its methods, parameters, references and documents in our words."""
