"""Fifteen small tasks, equal search budgets, one score: how optimizers compare where nobody tuned them to the task."""
