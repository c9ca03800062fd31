"""What one does with a run's players: talk with them, put benchmarks to them, have them judged."""
