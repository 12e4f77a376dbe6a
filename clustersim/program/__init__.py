"""What happens in one step, and in what order: ops, pipeline schedules, gradient synchronisation."""
