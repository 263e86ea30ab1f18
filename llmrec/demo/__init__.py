"""The demo's page: `session` and `settings` hold what was chosen, `view` and `tree` its looks, `page` the wiring."""
