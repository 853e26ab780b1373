"""The damping study: its config, trials, studies, pictures and page."""
