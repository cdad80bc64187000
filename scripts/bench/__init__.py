"""The benchmark: every method against dense training that was tuned as much, with logs that anybody can check."""
