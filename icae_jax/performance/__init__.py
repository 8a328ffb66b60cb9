"""What a program costs: FLOPs, chips, plans by compilation, benchmarks, profiles."""
