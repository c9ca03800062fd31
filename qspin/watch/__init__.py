"""What a run tells of itself, and who listens: a terminal, a file, a tracker."""
