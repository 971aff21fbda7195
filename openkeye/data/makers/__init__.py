"""The report's data recipes as makers over one's own videos and pictures (report, sections 3.2 and 5.1): one file per recipe.

A recipe says which jobs there are and turns one into samples; `run.make_data` runs the jobs and `output.OutputFolder` keeps
what they made. Where words about media are needed, a `Captioner` is asked, which is a model by name.
"""
