-- wrk: post the lines of a file in turn, and print the outcome as one line of JSON.
--   wrk … -s requests.lua http://host:port -- /route bodies.jsonl

local requests = {}
local turn = 0

function init(arguments)
  local headers = { ["Content-Type"] = "application/json" }
  for body in io.lines(arguments[2]) do
    requests[#requests + 1] = wrk.format("POST", arguments[1], headers, body)
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    'RESULT {"requests": %d, "seconds": %.6f, "mean_ms": %.3f, "p50_ms": %.3f, "p99_ms": %.3f, '
      .. '"errors": %d}\n',
    summary.requests, summary.duration / 1e6, latency.mean / 1e3,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    e.connect + e.read + e.write + e.status + e.timeout))
end
