import io.debezium.engine.ChangeEvent;
import io.debezium.engine.DebeziumEngine;
import io.debezium.engine.format.Json;
import java.util.List;
import java.util.Properties;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;

/** Drains a slot with the embedded Debezium engine into a counter, and ends after the last change. */
class Drain implements DebeziumEngine.ChangeConsumer<ChangeEvent<String, String>> {
    private final long expected;
    private long seen;
    private long began;

    Drain(long expected) {
        this.expected = expected;
    }

    @Override
    public void handleBatch(
            List<ChangeEvent<String, String>> records,
            DebeziumEngine.RecordCommitter<ChangeEvent<String, String>> committer)
            throws InterruptedException {
        if (began == 0) {
            began = System.nanoTime();
        }
        for (ChangeEvent<String, String> record : records) {
            committer.markProcessed(record);
        }
        committer.markBatchFinished();
        seen += records.size();
        if (seen >= expected) {
            System.out.println("seconds " + (System.nanoTime() - began) / 1e9);
            System.out.flush();
            Runtime.getRuntime().halt(0); // the caller reads its CPU time when it has ended
        }
    }

    public static void main(String[] arguments) {
        Properties settings = new Properties();
        for (int at = 1; at < arguments.length; at++) {
            String[] pair = arguments[at].split("=", 2);
            settings.setProperty(pair[0], pair[1]);
        }
        ExecutorService executor = Executors.newSingleThreadExecutor();
        executor.execute(
                DebeziumEngine.create(Json.class)
                        .using(settings)
                        .notifying(new Drain(Long.parseLong(arguments[0])))
                        .using((success, message, error) -> {
                            System.err.println(message);
                            System.exit(1);
                        })
                        .build());
    }
}
