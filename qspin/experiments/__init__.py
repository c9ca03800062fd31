"""Many runs, or the same rows without self-play."""
