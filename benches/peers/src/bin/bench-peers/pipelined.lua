-- Sends DEPTH requests at once and waits for their answers; wrk counts every answer.
local DEPTH = 16

init = function(args)
  local requests = {}
  for i = 1, DEPTH do requests[i] = wrk.format() end
  batch = table.concat(requests)
end

request = function() return batch end
