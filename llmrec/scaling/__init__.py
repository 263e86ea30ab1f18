"""Which model for my data and my budget: data quality, scaling laws, costs, and the pilot that feeds them."""
